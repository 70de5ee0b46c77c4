"""Memory-mapped files. A change on disk affects the process that mapped them.

A file that was removed, or replaced by another of its name, stays as it was for whoever has it open. One that is
written to changes the weights, and if one becomes shorter the system sends SIGBUS (see `crash_handler`).
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

EXPECTED_UNCHANGED = "expected it to stay as it was; load the model again."


class MappedFiles:
    """Files that are mapped, held open so that it shows whether they are still what they were."""

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
        """Raise `CheckpointError` where a file was written to or became shorter. Takes a microsecond a file."""
        for descriptor, (path, before) in self._files.items():
            now = os.fstat(descriptor)
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                how = "it was written to"
                if now.st_size != before.st_size:
                    how = f"it has {now.st_size:,} bytes and had {before.st_size:,}"
                raise CheckpointError(
                    f"{sanitize(path, 200)} changed while it was in use ({how}), {EXPECTED_UNCHANGED}"
                )

    @property
    def names(self) -> list[str]:
        """The files' names, in alphabetical order."""
        return sorted(path.name for path, _ in self._files.values())

    def sha256(self, progress: Callable[[str, int, int], None], name: str | None = None) -> str:
        """Return the SHA-256 of the files' bytes in hexadecimal, as `cat FILES | sha256sum` prints it.

        It is computed once, from the files as they were opened. A file that has replaced one of them since, under the
        same name, does not count.

        Args:
            progress: Called with "checking", the bytes read so far and all bytes.
            name: Hash only the file of this name. By default all of them, in the order of `names`.

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
    """The error about a mapped file that changed, if one did."""
    for mapped in list(_MAPPED):
        try:
            mapped.check()
        except CheckpointError as error:
            return error
    return None


def _blocks(descriptor: int) -> Iterator[bytes]:
    """A file from its beginning, whatever its position is."""
    offset = 0
    while block := os.pread(descriptor, BLOCK_BYTES, offset):
        yield block
        offset += len(block)


def _close(files: dict[int, Any]) -> None:
    for descriptor in files:
        with contextlib.suppress(OSError):
            os.close(descriptor)
