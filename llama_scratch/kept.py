"""Quantised weights, kept between runs in the user's cache folder, and mapped when they are there.

A file holds the pieces of one model's weights in the order in which they are packed: 8-bit values, then one
float32 scale a row, behind a table with each piece's checksum. It is named after what it was made from and on,
becomes visible when it is whole, and is left alone by no one's fault: what does not fit is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor

_FORMAT = 2
# All kept files together; the least recently used go first.
_MOST = 16 << 30


class KeptPieces:
    """Pieces of quantised weights: read where they were kept, and kept as they are made where they were not.

    files: those that the weights come from. shapes: (out, in) of each piece.
    """

    def __init__(self, files: Sequence[Path], shapes: Sequence[tuple[int, int]]):
        self._shapes = list(shapes)
        sizes = [rows * columns + 4 * rows for rows, columns in self._shapes]
        self._starts = np.cumsum([4 * len(sizes), *sizes]).tolist()
        self._folder = user_cache_path("llama-scratch", appauthor=False) / "int8"
        self._path = self._folder / _key(files, self._shapes)
        self._lock = threading.Lock()
        self._writing: Path | None = None
        self._checksums = np.zeros(len(sizes), dtype="<u4")
        self._missing = len(sizes)
        self._data = self._map()

    def get(self, i: int) -> tuple[Tensor, Tensor] | None:
        """Values (out, in) int8 and scales (out,) float32 of a piece, or None where it was not kept whole."""
        if self._data is None:
            return None
        piece = self._data[self._starts[i] : self._starts[i + 1]]
        if zlib.crc32(piece.data) != self._data[: 4 * len(self._shapes)].view("<u4")[i]:
            with contextlib.suppress(OSError):
                self._path.unlink()  # so that the next run keeps a whole one
            return None
        rows, columns = self._shapes[i]
        values = torch.from_numpy(piece[: rows * columns].view(np.int8)).view(rows, columns)
        return values, torch.from_numpy(piece[rows * columns :].view("<f4"))

    def put(self, i: int, values: Tensor, scales: Tensor) -> None:
        """Keep a piece; the last one makes the file visible. Where it cannot be kept nothing happens."""
        if self._data is not None:
            return
        piece = [np.ascontiguousarray(values.numpy()).data, scales.numpy().astype("<f4").data]
        with contextlib.suppress(OSError), self._lock:
            if (file := self._writing) is None:
                file = self._writing = self._begin()
            with file.open("r+b") as out:
                out.seek(self._starts[i])
                out.writelines(piece)
            self._checksums[i] = zlib.crc32(piece[1], zlib.crc32(piece[0]))
            self._missing -= 1
            if not self._missing:
                self._finish(file)

    def _map(self) -> np.memmap[tuple[int], np.dtype[np.uint8]] | None:
        try:
            status = self._path.lstat()
            own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
            if not (stat.S_ISREG(status.st_mode) and own and status.st_size == self._starts[-1]):
                return None
            os.utime(self._path)  # used just now
            # Copy on write, because torch wants memory that can be written; nothing ever is.
            return np.memmap(self._path, dtype=np.uint8, mode="c")
        except (OSError, ValueError):
            return None

    def _begin(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _make_room(self._folder, self._starts[-1])
        file = self._path.with_suffix(f".{os.getpid()}.part")
        with file.open("xb") as out:
            out.truncate(self._starts[-1])
        return file

    def _finish(self, file: Path) -> None:
        with file.open("r+b") as out:
            out.write(self._checksums.tobytes())
            out.flush()
            os.fsync(out.fileno())
        try:
            file.replace(self._path)
        except OSError:
            file.unlink()


def _key(files: Sequence[Path], shapes: Sequence[tuple[int, int]]) -> str:
    """A name for what the pieces were made from: the files as they are now; and on: torch and the CPU."""
    made = (
        _FORMAT,
        [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        shapes,
    )
    return hashlib.sha256(repr(made).encode()).hexdigest()[:32]


def _make_room(folder: Path, size: int) -> None:
    """Remove what an ended program left unfinished, and what was used longest ago where `size` more is too much."""
    files = []
    for path in folder.iterdir():
        status = path.lstat()
        if path.suffix == ".part" and not _runs(path):
            path.unlink()
        elif stat.S_ISREG(status.st_mode):
            files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(file_size for _, file_size, _ in files) + size
    for _, file_size, path in sorted(files):
        if total <= _MOST:
            return
        path.unlink()
        total -= file_size


def _runs(part: Path) -> bool:
    import psutil

    pid = part.suffixes[0].removeprefix(".")
    return pid.isdecimal() and psutil.pid_exists(int(pid))
