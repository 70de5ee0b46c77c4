"""The user's folders for caches, models and history (XDG on Linux)."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal


def user_folder(kind: Literal["cache", "config", "data", "state"]) -> Path:
    """Return the program's folder for one kind of files.

    Raises FileNotFoundError if there is no home directory, as in some containers.
    """
    import platformdirs

    try:
        path = getattr(platformdirs, f"user_{kind}_path")("llama-scratch", appauthor=False)
        if path.is_absolute():  # older versions of platformdirs leave "~" as it is
            return Path(path)
    except RuntimeError:
        pass
    raise FileNotFoundError(errno.ENOENT, f"no home directory; set HOME or XDG_{kind.upper()}_HOME")


def is_ours(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user and nobody else can write to it."""
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)


def trim_folder(
    files: Iterable[Path],
    *,
    max_files: int | None = None,
    max_bytes: int | None = None,
    remove: Callable[[Path], None] = Path.unlink,
) -> None:
    """Remove the least recently used files of a cache until it is within its limits.

    Args:
        files: The files. Other processes may remove them at the same time.
        max_files: Maximum number of files.
        max_bytes: Maximum total size in bytes.
        remove: Function that removes a file, or keeps it if it is in use.
    """
    entries = []
    for path in files:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                entries.append((status.st_mtime_ns, status.st_size, path))
    count, total = len(entries), sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if (max_files is None or count <= max_files) and (max_bytes is None or total <= max_bytes):
            return
        with contextlib.suppress(OSError):
            remove(path)
        if not os.path.lexists(path):
            count, total = count - 1, total - size
