"""Quantised weights, kept between runs in the user's cache folder, and mapped when they are there.

A file holds the pieces of one model's weights in the order in which they are packed: values, then scales, behind a
table with each piece's checksum. It is named after what it was made from and on, and becomes visible when it is whole;
until then it is a .part file, at which one program at a time is. What does not fit, or could have been written by
somebody else, is not read but made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import stat
import threading
import zlib
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from llama_scratch.folders import is_ours, user_folder
from llama_scratch.unfinished import NO_LINK, lock, remove_left

_FORMAT = 3
# All kept files together; the least recently used go first.
_MOST = 16 << 30
# Values and scales begin at whole lines of the CPU's cache: vectors that lie across two are read at half the speed.
_LINE = 64

Layout = tuple[tuple[tuple[int, ...], torch.dtype], tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of a piece's values and of its scales."""


class KeptPieces:
    """Pieces of quantised weights: read where they were kept, and kept as they are made where they were not.

    files: those that the weights come from. layouts: of each piece. made: what else decides what they hold.
    """

    def __init__(self, files: Sequence[Path], layouts: Sequence[Layout], made: str = ""):
        self._layouts = list(layouts)
        sizes = [sum(_lines(_nbytes(*part)) for part in layout) for layout in self._layouts]
        self._starts = np.cumsum([_lines(4 * len(sizes)), *sizes]).tolist()
        self._path: Path | None = None  # where nothing can be kept
        with contextlib.suppress(FileNotFoundError):  # no home
            self._path = user_folder("cache") / "weights" / _key(files, self._layouts, made)
        self._lock = threading.Lock()
        self._writing: BinaryIO | None = None
        self._checksums = np.zeros(len(sizes), dtype="<u4")
        self._missing = len(sizes)
        self._data = self._map()

    def get(self, i: int) -> tuple[Tensor, Tensor] | None:
        """Values and scales of a piece, or None where it was not kept whole."""
        if self._data is None or self._path is None:
            return None
        piece = self._data[self._starts[i] : self._starts[i + 1]]
        if zlib.crc32(piece.data) != self._data[: 4 * len(self._layouts)].view("<u4")[i]:
            with contextlib.suppress(OSError):
                self._path.unlink()  # so that the next run keeps a whole one
            return None
        (values, values_type), (scales, scales_type) = self._layouts[i]
        data, start = torch.from_numpy(piece), _lines(_nbytes(values, values_type))
        return (
            data[: _nbytes(values, values_type)].view(values_type).view(values),
            data[start : start + _nbytes(scales, scales_type)].view(scales_type).view(scales),
        )

    def check(self) -> None:
        """Where one piece is damaged, take none: for those that are made one after the other."""
        if self._data is not None and any(self.get(i) is None for i in range(len(self._layouts))):
            self._data = None

    def put(self, i: int, values: Tensor, scales: Tensor) -> None:
        """Keep a piece; the last one makes the file visible. Where one cannot be kept, none is."""
        if self._data is not None:
            return
        parts = [part.contiguous().view(torch.uint8).flatten().numpy().data for part in (values, scales)]
        piece = [data for part in parts for data in (part, bytes(_lines(part.nbytes) - part.nbytes))]
        with self._lock:
            if self._path is None:
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
        file.flush()
        self._checksums[i] = reduce(lambda crc, part: zlib.crc32(part, crc), piece, 0)
        self._missing -= 1
        if not self._missing:
            file.seek(0)
            file.write(self._checksums.tobytes())
            file.flush()
            os.fsync(file.fileno())
            _part(path).replace(path)
            file.close()

    def _give_up(self, path: Path) -> None:
        """Nothing more is kept, and what was begun is gone."""
        self._path = None
        if self._writing is not None:
            with contextlib.suppress(OSError):
                _part(path).unlink()
            with contextlib.suppress(OSError):
                self._writing.close()

    def _map(self) -> np.memmap[tuple[int], np.dtype[np.uint8]] | None:
        if self._path is None:
            return None
        try:
            with open(os.open(self._path, os.O_RDONLY | NO_LINK), "rb") as file:
                status = os.fstat(file.fileno())
                whole = stat.S_ISREG(status.st_mode) and status.st_size == self._starts[-1]
                if not (whole and is_ours(status) and is_ours(self._path.parent.stat())):
                    return None
                os.utime(file.fileno())  # used just now
                # Copy on write, because torch wants memory that can be written; nothing ever is.
                return np.memmap(file, dtype=np.uint8, mode="c")
        except (OSError, ValueError):
            return None


def _part(path: Path) -> Path:
    return path.with_suffix(".part")


def _begin(path: Path, size: int) -> BinaryIO:
    """The file's beginning, locked. Raises OSError where there can be none, as another program is at it."""
    if size > _MOST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_ours(path.parent.stat()):
        raise PermissionError
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
    """Remove what an ended program left unfinished, and what was used longest ago where `size` more is too much."""
    remove_left(folder, "*.part")
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another program makes room too
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(file_size for _, file_size, _ in files) + size
    for _, file_size, path in sorted(files):
        if total <= _MOST:
            return
        if path.suffix != ".part":
            path.unlink(missing_ok=True)
            total -= file_size
