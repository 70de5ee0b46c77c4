"""Memory-mapped files. A change on disk affects the process that mapped them.

If a file is removed or replaced, the mapping still has the old content. If a file is written to, the weights change. If
a file is truncated, reading beyond its end raises SIGBUS (see `crash_handler`).
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_scratch.errors import CheckpointError, sanitize
from llama_scratch.system.hashing import BLOCK_BYTES, add_blocks, new_digest

EXPECTED_UNCHANGED = "Load the model again."


class MappedFiles:
    """Keeps mapped files open to detect changes."""

    def __init__(self, paths: Iterable[Path]):
        self._files: dict[int, tuple[Path, os.stat_result]] = {}  # by descriptor
        self._digests: dict[str | None, str] = {}
        weakref.finalize(self, _close, self._files)
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            self._files[descriptor] = path, os.fstat(descriptor)
        _MAPPED.add(self)

    def __str__(self) -> str:
        return " and ".join(sanitize(path.name) for path, _ in self._files.values()) or "in no file"

    def check(self) -> None:
        """Raise `CheckpointError` if a file was written to or truncated.

        This takes a microsecond per file.
        """
        for descriptor, (path, before) in self._files.items():
            now = os.fstat(descriptor)
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                how = "it was written to"
                if now.st_size != before.st_size:
                    how = f"from {before.st_size:,} to {now.st_size:,} bytes"
                raise CheckpointError(
                    f"{sanitize(path, 200)} changed while it was in use ({how}). {EXPECTED_UNCHANGED}"
                )

    @property
    def names(self) -> list[str]:
        """The files' names, in alphabetical order."""
        return sorted(path.name for path, _ in self._files.values())

    def sha256(self, progress: Callable[[str, int, int], None], name: str | None = None) -> str:
        """Compute the SHA-256 of the files' bytes, in hexadecimal.

        The result equals that of `cat FILES | sha256sum` and is cached. It refers to the files that were opened, even
        if other files have replaced them since then.

        Args:
            progress: Called with "checking", the bytes read so far and the total bytes.
            name: Hash only the file with this name. By default all of them, in the order of `names`.

        Raises:
            CheckpointError: If a file was written to before its digest was computed.
        """
        if name not in self._digests:
            self.check()
            files = sorted((path.name, file, status.st_size) for file, (path, status) in self._files.items())
            files = [entry for entry in files if name in (None, entry[0])]
            total, done, digest = sum(size for *_, size in files), 0, new_digest("sha256")

            def advance(count: int) -> None:
                nonlocal done
                done += count
                progress("checking", done, total)

            for _, file, _ in files:
                add_blocks([digest], _blocks(file), advance)
            self.check()
            self._digests[name] = digest.hexdigest()
        return self._digests[name]


_MAPPED: weakref.WeakSet[MappedFiles] = weakref.WeakSet()


def changed_file() -> CheckpointError | None:
    """Return the error for the first mapped file that has changed, if any."""
    for mapped in list(_MAPPED):
        try:
            mapped.check()
        except CheckpointError as error:
            return error
    return None


def _blocks(descriptor: int) -> Iterator[bytes]:
    """Yield the blocks of a file from its beginning, whatever its current position."""
    offset = 0
    while block := os.pread(descriptor, BLOCK_BYTES, offset):
        yield block
        offset += len(block)


def _close(files: dict[int, Any]) -> None:
    for descriptor in files:
        with contextlib.suppress(OSError):
            os.close(descriptor)
