"""A GGUF file's header: metadata and the table of its tensors, and where each of them lies.

It is walked here, every count and size checked against the file before it is believed: the gguf package's reader
trusts them, and a 43-byte file can keep it busy for ever. How large the blocks of each type are is the package's
knowledge. Source: the GGUF specification in ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_scratch.config import Fields
from llama_scratch.errors import FETCH_AGAIN, CheckpointError, printable


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `shape` as torch counts it, `start` and `size` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """The metadata and table of tensors of the file at `path`; every place in it lies within the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: list[TensorInfo]


# GGUF's type number of a metadata value → struct's letter; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Several times the largest vocabulary or list of merges.
_MAX_ARRAY = 1 << 19


class _Cursor:
    """Reads values one after the other and never beyond the end."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.position = 0

    def take(self, size: int) -> int:
        """Step over `size` bytes and return where they start."""
        start = self.position
        if size > len(self.data) - start:
            raise CheckpointError(f"{len(self.data):,} bytes, expected {size:,} more at byte {start:,}; {FETCH_AGAIN}")
        self.position = start + size
        return start

    def scalars(self, letter: str, count: int = 1) -> tuple[Any, ...]:
        form = f"<{count}{letter}"
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))

    def scalar(self, letter: str) -> Any:
        return self.scalars(letter)[0]

    def string(self) -> str:
        start = self.take(size := self.scalar("Q"))
        return self.data[start : start + size].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.string()
        if kind == 9:
            return self.array()
        return self.scalar(self._letter(kind))

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > _MAX_ARRAY:
            raise CheckpointError(f"an array of {count:,} elements, expected at most {_MAX_ARRAY:,}; {FETCH_AGAIN}")
        if kind == 8:
            return [self.string() for _ in range(count)]
        return list(self.scalars(self._letter(kind), count))

    def _letter(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(
                f"a metadata value of the unknown type {kind} at byte {self.position:,}; {FETCH_AGAIN}"
            )
        return _SCALARS[kind]


def read_header(path: Path) -> Header:
    """Metadata and tensor table of a GGUF file, version 2 or 3. Raises `CheckpointError` for any other file."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise CheckpointError(f"{path} has under 24 bytes, expected a GGUF file; {FETCH_AGAIN}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read_header(path, _Cursor(data))
            except CheckpointError as error:
                raise CheckpointError(f"{path} is not a whole GGUF file: {error}") from error


def _read_header(path: Path, cursor: _Cursor) -> Header:
    magic, version, n_tensors, n_metadata = struct.unpack_from("<4sIQQ", cursor.data, cursor.take(24))
    if magic != b"GGUF" or version not in (2, 3):
        raise CheckpointError(
            f"it begins with {magic!r} and version {version}, expected GGUF version 2 or 3; {FETCH_AGAIN}"
        )
    metadata: dict[str, Any] = {}
    for _ in range(n_metadata):  # each takes bytes of the file, so a lie about their number soon ends
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"the metadata key '{printable(key)}' stands there twice; {FETCH_AGAIN}")
        metadata[key] = cursor.value(cursor.scalar("I"))
    table = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.scalar("I")
        if n_dims > 4:
            raise CheckpointError(
                f"the tensor '{printable(name)}' has {n_dims} dimensions, expected at most 4; {FETCH_AGAIN}"
            )
        dims, type_, offset = cursor.scalars("Q", n_dims), cursor.scalar("I"), cursor.scalar("Q")
        table.append((name, tuple(reversed(dims)), type_, offset))
    alignment = Fields(metadata).integer("general.alignment", default=32)
    if alignment % 8 or alignment & (alignment - 1):
        raise CheckpointError(f"general.alignment is {alignment}, expected a power of two from 8 on; {FETCH_AGAIN}")
    data_start = _aligned(cursor.position, alignment)
    tensors = [_place(entry, data_start, len(cursor.data)) for entry in table]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise CheckpointError(f"a tensor stands there twice; {FETCH_AGAIN}")
    # One lies behind the other and the last one ends the file, so that no damage sends a reader elsewhere.
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start != _aligned(end, alignment):
            raise CheckpointError(
                f"the tensor '{printable(tensor.name)}' begins at byte {tensor.start:,}, "
                f"expected it at {_aligned(end, alignment):,}; {FETCH_AGAIN}"
            )
        end = tensor.start + tensor.size
    if len(cursor.data) not in (end, _aligned(end, alignment)):
        raise CheckpointError(f"{len(cursor.data):,} bytes, expected {end:,} by its table of tensors; {FETCH_AGAIN}")
    return Header(path, metadata, tensors)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _place(entry: tuple[str, tuple[int, ...], int, int], data_start: int, file_size: int) -> TensorInfo:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, shape, type_, offset = entry
    try:
        block, block_size = GGML_QUANT_SIZES[GGMLQuantizationType(type_)]
    except (ValueError, KeyError):
        raise CheckpointError(f"the tensor '{printable(name)}' has the unknown type {type_}; {FETCH_AGAIN}") from None
    count = math.prod(shape)
    size = count // block * block_size
    start = data_start + offset
    if not shape or count == 0 or shape[-1] % block or start + size > file_size:
        raise CheckpointError(
            f"{file_size:,} bytes, expected the tensor '{printable(name)}' of shape {shape} at byte {start:,}; "
            + FETCH_AGAIN
        )
    return TensorInfo(name, shape, type_, start, size)
