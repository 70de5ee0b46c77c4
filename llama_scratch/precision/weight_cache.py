"""Cache packed weights between runs in memory-mapped files.

A file contains a table with the checksum of each piece of a model's weights, then the values and scales of the pieces
in packing order. Its name is a hash of its inputs. Until all pieces are finished, it is a .part file that only one
process writes. If that process ends early, the next one continues the .part file. Damaged pieces are packed again.
Files that another user could have written are not read.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import math
import os
import stat
import threading
import time
import zlib
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from llama_scratch.system.atomic_files import NO_LINK, lock, remove_stale
from llama_scratch.system.folders import is_ours, trim_folder, user_folder

_FORMAT_VERSION = 4
# Total size of all files. The least recently used ones are removed first.
_MAX_BYTES = 16 << 30
_STALE_AFTER_S = 7 * 24 * 3600  # age at which unlocked .part files are removed
# Added to the checksum of a finished piece: a checksum may be 0, but 0 in the table means that the piece is missing.
_FINISHED = 1 << 32
# Alignment of values and scales. Vector loads across two cache lines run at half the speed.
_CACHE_LINE = 64

Layout = tuple[tuple[tuple[int, ...], torch.dtype], tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of a piece's values and of its scales."""


class PackedWeightCache:
    """The cached pieces of one model's packed weights.

    Args:
        files: The weight files.
        layouts: The layout of each piece.
        recipe: Other inputs that the pieces depend on, such as the calibration text.
    """

    def __init__(self, files: Sequence[Path], layouts: Sequence[Layout], recipe: str = ""):
        self._layouts = list(layouts)
        sizes = [sum(_lines(_nbytes(*part)) for part in layout) for layout in self._layouts]
        self._starts = np.cumsum([_lines(8 * len(sizes)), *sizes]).tolist()
        self._path: Path | None = None  # None if the cache is not writable
        with contextlib.suppress(FileNotFoundError):  # no home directory
            self._path = user_folder("cache") / "weights" / _key(files, self._layouts, recipe)
        self._lock = threading.Lock()
        self._opened = False
        self._data: np.memmap[tuple[int], np.dtype[np.uint8]] | None = None
        self._writing: BinaryIO | None = None  # the .part file, locked
        self._table = np.zeros(len(sizes), dtype="<u8")  # 0: the piece is missing

    def get(self, i: int) -> tuple[Tensor, Tensor] | None:
        """Return the values and scales of a piece; None if it is missing or damaged."""
        with self._lock:
            self._open()
            entry, unfinished = int(self._table[i]), self._writing is not None
        if self._data is None or (unfinished and not entry):
            return None
        piece = self._data[self._starts[i] : self._starts[i + 1]]
        if zlib.crc32(piece.data) + _FINISHED != entry:
            with self._lock:
                self._discard(i, entry)
            return None
        (values, values_type), (scales, scales_type) = self._layouts[i]
        data, start = torch.from_numpy(piece), _lines(_nbytes(values, values_type))
        return (
            data[: _nbytes(values, values_type)].view(values_type).view(values),
            data[start : start + _nbytes(scales, scales_type)].view(scales_type).view(scales),
        )

    def put(self, i: int, values: Tensor, scales: Tensor) -> None:
        """Write a piece. After the last piece, the file is renamed to its final name.

        If a piece cannot be written, no further pieces are written.

        Args:
            i: Index of the piece.
            values: Its values.
            scales: Its scales.
        """
        parts = [part.contiguous().view(torch.uint8).flatten().numpy().data for part in (values, scales)]
        piece = [data for part in parts for data in (part, bytes(_lines(part.nbytes) - part.nbytes))]
        with self._lock:
            self._open()
            if self._path is None or self._table[i]:
                return
            try:
                self._put(self._path, i, piece)
            except OSError:
                self._give_up(self._path)

    def _put(self, path: Path, i: int, piece: Sequence[memoryview | bytes]) -> None:
        if (file := self._writing) is None:
            file = self._writing = _begin(path, self._starts[-1])
        file.seek(self._starts[i])
        file.writelines(piece)
        file.flush()  # before the table marks it as finished
        self._enter(file, i, reduce(lambda crc, part: zlib.crc32(part, crc), piece, 0) + _FINISHED)
        if self._table.all():
            self._complete(path, file)

    def _enter(self, file: BinaryIO, i: int, entry: int) -> None:
        """Write a piece's entry in the table."""
        self._table[i] = entry
        file.seek(8 * i)
        file.write(self._table[i].tobytes())
        file.flush()

    def _complete(self, path: Path, file: BinaryIO) -> None:
        """Rename the .part file to its final name."""
        os.fsync(file.fileno())
        _part(path).replace(path)
        self._writing = None
        file.close()

    def _discard(self, i: int, entry: int) -> None:
        """Mark a damaged piece as missing. A complete file becomes a .part file again."""
        if self._path is None or self._table[i] != entry:
            return
        try:
            if self._writing is None:
                self._writing = _reopen(self._path, self._starts[-1])
            self._enter(self._writing, i, 0)
        except OSError:
            self._give_up(self._path)

    def _give_up(self, path: Path) -> None:
        """Stop writing pieces, and remove the .part file."""
        self._path = None
        if self._writing is not None:
            with contextlib.suppress(OSError):
                _part(path).unlink()
            with contextlib.suppress(OSError):
                self._writing.close()
            self._writing = None

    def _open(self) -> None:
        """Map the complete file, or lock and map the .part file of an ended process.

        Only the first call has an effect.
        """
        if self._path is None or self._opened:
            return
        self._opened = True
        with contextlib.suppress(OSError, ValueError):
            try:
                self._map(self._path)
            except OSError:
                self._writing = _take_over(_part(self._path), self._starts[-1])
                self._map(_part(self._path))
                if self._table.all():  # the process ended just before renaming it
                    self._complete(self._path, self._writing)

    def _map(self, path: Path) -> None:
        # Opened separately, because a memory map keeps its file's lock.
        with _open_ours(path, self._starts[-1], os.O_RDONLY) as file:
            # Copy-on-write, because torch requires writable memory. It is never written to.
            self._data = np.memmap(file, dtype=np.uint8, mode="c")
        self._table[:] = self._data[: self._table.nbytes].view("<u8")


def _part(path: Path) -> Path:
    return path.with_suffix(".part")


def _open_ours(path: Path, size: int, flags: int) -> BinaryIO:
    """Open a file of the expected size that no other user can write, and mark it as used.

    Raises OSError if the file does not meet these conditions.
    """
    file = open(os.open(path, flags | NO_LINK), "rb" if flags == os.O_RDONLY else "r+b")  # noqa: SIM115 - kept open
    try:
        status = os.fstat(file.fileno())
        whole = stat.S_ISREG(status.st_mode) and status.st_size == size
        if not (whole and is_ours(status) and is_ours(path.parent.stat())):
            raise PermissionError
        os.utime(file.fileno())
    except OSError:
        file.close()
        raise
    return file


def _take_over(part: Path, size: int) -> BinaryIO:
    """Lock the .part file of an ended process.

    Raises OSError if the file does not exist or is still being written.
    """
    file = _open_ours(part, size, os.O_RDWR)
    if not lock(file.fileno(), part, certain=True):
        file.close()
        raise BlockingIOError
    return file


def _reopen(path: Path, size: int) -> BinaryIO:
    """Turn a complete file into a locked .part file again. If that fails, remove it and raise OSError."""
    try:
        file = _take_over(path, size)
        if os.path.lexists(_part(path)):  # another process is writing a new one
            file.close()
            raise FileExistsError
        path.replace(_part(path))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return file


def _begin(path: Path, size: int) -> BinaryIO:
    """Create and lock a .part file.

    Raises OSError if it cannot be created, or another process is writing it.
    """
    if size > _MAX_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_ours(path.parent.stat()):
        raise PermissionError
    _remove(_part(path))  # one that cannot be continued
    _limit_cache(path.parent, size)
    file = open(os.open(_part(path), os.O_RDWR | os.O_CREAT | NO_LINK, 0o600), "r+b")  # noqa: SIM115 - kept open
    try:
        if not lock(file.fileno(), _part(path)):
            raise BlockingIOError
        file.truncate(size)
    except OSError:
        file.close()
        raise
    return file


def _lines(size: int) -> int:
    return -(-size // _CACHE_LINE) * _CACHE_LINE


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _key(files: Sequence[Path], layouts: Sequence[Layout], recipe: str) -> str:
    """Return the name of a file: a hash of the weight files, layouts, recipe, torch and CPU."""
    origin = (
        _FORMAT_VERSION,
        [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        layouts,
        recipe,
    )
    return hashlib.sha256(repr(origin).encode()).hexdigest()[:32]


def _limit_cache(folder: Path, size: int) -> None:
    """Make room for `size` bytes: remove stale .part files and the least recently used files."""
    for part in folder.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process is doing the same
            if time.time() - part.lstat().st_mtime > _STALE_AFTER_S:
                _remove(part)
    trim_folder(folder.iterdir(), max_bytes=_MAX_BYTES - size, remove=_remove)


def _remove(path: Path) -> None:
    """Remove a file, unless it is a .part file that a process is writing."""
    if path.suffix == ".part":
        remove_stale(path.parent, glob.escape(path.name))
    else:
        path.unlink(missing_ok=True)
