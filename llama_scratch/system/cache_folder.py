"""Limit the size of a folder of cached files."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path


def remove_least_recently_used(
    paths: Iterable[Path],
    *,
    max_files: int | None = None,
    max_bytes: int | None = None,
    remove: Callable[[Path], None] = lambda path: path.unlink(missing_ok=True),
) -> None:
    """Remove the files that were used longest ago, until the others are within the limits.

    Args:
        paths: The files; their time of modification says when they were used.
        max_files: Number of files that may stay.
        max_bytes: Bytes of all files that may stay.
        remove: Removes a file. It may leave one that is in use.

    Raises:
        OSError: If a file cannot be removed.
    """
    files = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # another process limits the folder too
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                files.append((status.st_mtime_ns, status.st_size, path))
    count, total = len(files), sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if (max_files is None or count <= max_files) and (max_bytes is None or total <= max_bytes):
            return
        remove(path)
        if not os.path.lexists(path):
            count, total = count - 1, total - size
