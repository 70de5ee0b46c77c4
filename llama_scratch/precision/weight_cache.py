"""Quantized weights, kept between runs in the user's cache folder, and mapped if they are there.

A file holds the pieces of one model's weights in the order in which they are packed: values, then scales, after a table
with each piece's checksum. It is named after what it was made from and on. Until all pieces are finished it is a .part
file that one process at a time writes, and the next process continues the .part file of one that has ended. Pieces that
are damaged are made again. Files that somebody else could have written are not read.
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

_FORMAT = 4
# All kept files together; the least recently used go first.
_MOST = 16 << 30
_STALE = 7 * 24 * 3600  # seconds after which a .part file that no process writes is removed
# Added to the checksum of a finished piece, because a checksum can be 0.
_FINISHED = 1 << 32
# Values and scales begin at whole lines of the CPU's cache: vectors that lie across two are read at half the speed.
_LINE = 64

Layout = tuple[tuple[tuple[int, ...], torch.dtype], tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of a piece's values and of its scales."""


class PackedWeightCache:
    """Pieces of quantized weights: read if they were kept, else kept as they are made.

    Args:
        files: The files that the weights come from.
        layouts: The layout of each piece.
        made: What else decides what the pieces hold.
    """

    def __init__(self, files: Sequence[Path], layouts: Sequence[Layout], made: str = ""):
        self._layouts = list(layouts)
        sizes = [sum(_lines(_nbytes(*part)) for part in layout) for layout in self._layouts]
        self._starts = np.cumsum([_lines(8 * len(sizes)), *sizes]).tolist()
        self._path: Path | None = None  # None if nothing can be kept
        with contextlib.suppress(FileNotFoundError):  # no home
            self._path = user_folder("cache") / "weights" / _key(files, self._layouts, made)
        self._lock = threading.Lock()
        self._opened = False
        self._data: np.memmap[tuple[int], np.dtype[np.uint8]] | None = None
        self._writing: BinaryIO | None = None  # the .part file, locked
        self._table = np.zeros(len(sizes), dtype="<u8")  # 0 for a piece that is missing

    def get(self, i: int) -> tuple[Tensor, Tensor] | None:
        """Values and scales of a piece; None if it is missing or damaged, and so has to be made."""
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
        """Keep a piece; the last one makes the file visible. If one cannot be kept, no other is."""
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
        file.flush()  # before the table says that it is finished
        self._enter(file, i, reduce(lambda crc, part: zlib.crc32(part, crc), piece, 0) + _FINISHED)
        if self._table.all():
            self._complete(path, file)

    def _enter(self, file: BinaryIO, i: int, entry: int) -> None:
        """Write a piece's entry of the table."""
        self._table[i] = entry
        file.seek(8 * i)
        file.write(self._table[i].tobytes())
        file.flush()

    def _complete(self, path: Path, file: BinaryIO) -> None:
        """Make the file visible."""
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
        """Keep no more pieces, and remove the .part file."""
        self._path = None
        if self._writing is not None:
            with contextlib.suppress(OSError):
                _part(path).unlink()
            with contextlib.suppress(OSError):
                self._writing.close()
            self._writing = None

    def _open(self) -> None:
        """Once: map the complete file, or else lock and map the .part file that an ended process left."""
        if self._path is None or self._opened:
            return
        self._opened = True
        with contextlib.suppress(OSError, ValueError):
            try:
                self._map(self._path)
            except OSError:
                self._writing = _take_over(_part(self._path), self._starts[-1])
                self._map(_part(self._path))
                if self._table.all():  # it ended just before it made the file visible
                    self._complete(self._path, self._writing)

    def _map(self, path: Path) -> None:
        # A file of its own, because a map holds its file's lock.
        with _open_ours(path, self._starts[-1], os.O_RDONLY) as file:
            # Copy on write, because torch needs writable memory. It is never written.
            self._data = np.memmap(file, dtype=np.uint8, mode="c")
        self._table[:] = self._data[: self._table.nbytes].view("<u8")


def _part(path: Path) -> Path:
    return path.with_suffix(".part")


def _open_ours(path: Path, size: int, flags: int) -> BinaryIO:
    """Open a file that nobody else can write, and mark it as used. Raises OSError if there is none of that size."""
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
    """Lock the .part file of an ended process. Raises OSError if there is none, or a process still writes it."""
    file = _open_ours(part, size, os.O_RDWR)
    if not lock(file.fileno(), part, certain=True):
        file.close()
        raise BlockingIOError
    return file


def _reopen(path: Path, size: int) -> BinaryIO:
    """Make a complete file a locked .part file again. Raises OSError if it cannot be; the file is removed then."""
    try:
        file = _take_over(path, size)
        if os.path.lexists(_part(path)):  # another process makes a new one
            file.close()
            raise FileExistsError
        path.replace(_part(path))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return file


def _begin(path: Path, size: int) -> BinaryIO:
    """Begin a .part file, locked. Raises OSError if it cannot be written, or another process writes it."""
    if size > _MOST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_ours(path.parent.stat()):
        raise PermissionError
    _remove(_part(path))  # one that cannot be continued
    _make_room(path.parent, size)
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
    return -(-size // _LINE) * _LINE


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _key(files: Sequence[Path], layouts: Sequence[Layout], what: str) -> str:
    """A name for what the pieces were made from: the files as they are now; and on: torch and the CPU."""
    made = (
        _FORMAT,
        [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        layouts,
        what,
    )
    return hashlib.sha256(repr(made).encode()).hexdigest()[:32]


def _make_room(folder: Path, size: int) -> None:
    """Remove stale .part files, and the least recently used files if `size` more bytes are too many."""
    for path in folder.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process makes room too
            if time.time() - path.lstat().st_mtime > _STALE:
                _remove(path)
    trim_folder(folder.iterdir(), max_bytes=_MOST - size, remove=_remove)


def _remove(path: Path) -> None:
    """Remove a file, but not a .part file that a process writes."""
    if path.suffix == ".part":
        remove_stale(path.parent, glob.escape(path.name))
    else:
        path.unlink(missing_ok=True)
