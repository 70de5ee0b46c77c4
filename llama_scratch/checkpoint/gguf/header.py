"""The header of a GGUF file: metadata and the table of tensors.

This parser checks every count and size against the file size before using it. The reader of the gguf package does not,
so a 43-byte file can make it loop forever. Only the block sizes of the types come from that package.
Source: the GGUF specification in ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_scratch.checkpoint.fields import Fields
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, UnsupportedError, sanitize
from llama_scratch.system.small_files import read_start


@dataclass(frozen=True)
class TensorInfo:
    """The location of a tensor.

    Args:
        name: Name in the file.
        shape: Shape in torch's order of dimensions, the reverse of GGUF's.
        type: GGUF's type number.
        start: Offset in the file, in bytes.
        size: Size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int


@dataclass(frozen=True)
class GGUFHeader:
    """The metadata and tensors of a file. Every tensor is within the file.

    Args:
        path: The file.
        metadata: Key → value.
        tensors: The tensors, in the order of the table.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: list[TensorInfo]

    @property
    def elements(self) -> int:
        """Number of elements in all arrays of the metadata."""
        return sum(len(value) for value in self.metadata.values() if isinstance(value, list))


# GGUF's type number of a metadata value → struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING_SIZE = struct.Struct("<Q")
# Maximum number of elements in all arrays together. Llama 3's tokens, token types and merges have 536,659.
MAX_ELEMENTS = 1 << 21
# A Llama file has about 40 keys, and the largest Llama 1,138 tensors.
_MAX_KEYS, _MAX_TENSORS = 1 << 12, 1 << 12
# Type that ggml removed → its name and its replacement, which llama.cpp repacks when it loads a file.
# Source: `enum ggml_type` in ggml.h.
_REMOVED = {
    4: ("Q4_2", "Q4_0"),
    5: ("Q4_3", "Q4_1"),
    31: ("Q4_0_4_4", "Q4_0"),
    32: ("Q4_0_4_8", "Q4_0"),
    33: ("Q4_0_8_8", "Q4_0"),
    36: ("IQ4_NL_4_4", "IQ4_NL"),
    37: ("IQ4_NL_4_8", "IQ4_NL"),
    38: ("IQ4_NL_8_8", "IQ4_NL"),
}
# ggml may assign type numbers below this one in the future. A larger number means that the file is damaged.
_FUTURE_TYPES = 256


class _Cursor:
    """Reads values in sequence, never past the end of the file.

    Args:
        data: The file.
        max_elements: Maximum number of elements in all arrays together.
    """

    def __init__(self, data: mmap.mmap, max_elements: int):
        self.data = data
        self.position = 0
        self._elements_left = max_elements

    def take(self, size: int) -> int:
        """Skip `size` bytes and return their offset."""
        start = self.position
        if size > len(self.data) - start:
            raise CheckpointError(
                f"it ends after {len(self.data):,} bytes, expected {size:,} more at byte {start:,}. {REDOWNLOAD_HINT}"
            )
        self.position = start + size
        return start

    def scalars(self, letter: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{letter}"
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout)))

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
        if count > self._elements_left:
            raise CheckpointError(
                f"it has an array of {count:,} elements, expected at most {MAX_ELEMENTS:,} in all arrays. "
                + REDOWNLOAD_HINT
            )
        self._elements_left -= count
        return self._strings(count) if kind == 8 else list(self.scalars(self._letter(kind), count))

    def _strings(self, count: int) -> list[str]:
        """Read many strings (often 400,000), several times faster than `string`."""
        data, position, end = self.data, self.position, len(self.data)
        size_at = _STRING_SIZE.unpack_from
        strings = []
        for _ in range(count):
            start = position + 8
            if start > end or (stop := start + size_at(data, position)[0]) > end:
                self.position = position
                self.string()  # raises
            strings.append(data[start:stop].decode("utf-8", errors="replace"))
            position = stop
        self.position = position
        return strings

    def _letter(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(
                f"it has a metadata value of the unknown type {kind} at byte {self.position:,}. {REDOWNLOAD_HINT}"
            )
        return _SCALARS[kind]


def read_header(path: Path, max_elements: int = MAX_ELEMENTS) -> GGUFHeader:
    """Read metadata and tensor table of a GGUF file, version 2 or 3.

    Args:
        path: The file.
        max_elements: Maximum number of elements in all metadata arrays together.

    Raises:
        UnsupportedError: If the byte order, version or a tensor type is not supported.
        CheckpointError: If the file is damaged or not GGUF.
    """
    read_start(path)  # raises a specific error for a git-lfs pointer or a web page
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise CheckpointError(f"{path} has under 24 bytes, too few for a GGUF file. {REDOWNLOAD_HINT}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read_header(path, _Cursor(data, max_elements))
            except UnsupportedError as error:
                raise UnsupportedError(f"{path}: {error}") from error
            except CheckpointError as error:
                raise CheckpointError(f"{path} is not a complete GGUF file: {error}") from error


def _read_header(path: Path, cursor: _Cursor) -> GGUFHeader:
    magic, version, n_tensors, n_metadata = struct.unpack_from("<4sIQQ", cursor.data, cursor.take(24))
    if magic != b"GGUF":
        raise CheckpointError(f"it starts with {magic!r}, expected GGUF. {REDOWNLOAD_HINT}")
    if version not in (2, 3):
        raise _unsupported_version(version)
    for count, limit, name in ((n_metadata, _MAX_KEYS, "metadata keys"), (n_tensors, _MAX_TENSORS, "tensors")):
        if count > limit:
            raise CheckpointError(f"it has {count:,} {name}, expected at most {limit:,}. {REDOWNLOAD_HINT}")
    metadata: dict[str, Any] = {}
    for _ in range(n_metadata):  # each entry consumes bytes, so a count that is too large reaches the end of the file
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"the metadata key '{sanitize(key)}' is repeated. {REDOWNLOAD_HINT}")
        metadata[key] = cursor.value(cursor.scalar("I"))
    table = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.scalar("I")
        if n_dims > 4:
            raise CheckpointError(
                f"the tensor '{sanitize(name)}' has {n_dims} dimensions, expected at most 4. {REDOWNLOAD_HINT}"
            )
        dims, type_, offset = cursor.scalars("Q", n_dims), cursor.scalar("I"), cursor.scalar("Q")
        table.append((name, tuple(reversed(dims)), type_, offset))
    alignment = Fields(metadata).integer("general.alignment", default=32)
    if alignment % 8 or alignment & (alignment - 1):
        raise CheckpointError(f"general.alignment is {alignment}, expected a power of two ≥ 8. {REDOWNLOAD_HINT}")
    data_start = _aligned(cursor.position, alignment)
    tensors = [_place(entry, data_start, len(cursor.data)) for entry in table]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise CheckpointError(f"a tensor is repeated. {REDOWNLOAD_HINT}")
    # The tensors must be contiguous and fill the file, so every damaged offset is detected.
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start != _aligned(end, alignment):
            raise CheckpointError(
                f"the tensor '{sanitize(tensor.name)}' starts at byte {tensor.start:,}, "
                f"expected {_aligned(end, alignment):,}. {REDOWNLOAD_HINT}"
            )
        end = tensor.start + tensor.size
    if len(cursor.data) not in (end, _aligned(end, alignment)):
        raise CheckpointError(
            f"it has {len(cursor.data):,} bytes, expected {end:,} by its table of tensors. {REDOWNLOAD_HINT}"
        )
    return GGUFHeader(path, metadata, tensors)


def _unsupported_version(version: int) -> CheckpointError:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, 2, 3):
        return UnsupportedError(
            f"it is in big-endian byte order (version {version} is {swapped} with swapped bytes), which is not "
            "supported. Convert it with 'gguf-convert-endian FILE little' from the gguf package, or use a "
            "little-endian file."
        )
    if version == 1:
        return UnsupportedError(
            "it is GGUF version 1, expected version 2 or 3. Convert the original model again with llama.cpp."
        )
    if 3 < version < 32:  # a later one
        return UnsupportedError(f"it is GGUF version {version}, expected version 2 or 3. Use a file of version 3.")
    return CheckpointError(f"it has version {version}, expected GGUF version 2 or 3. {REDOWNLOAD_HINT}")


def _unsupported_type(name: str, type_: int) -> CheckpointError:
    name = sanitize(name)
    if type_ in _REMOVED:
        old, new = _REMOVED[type_]
        return UnsupportedError(
            f"the tensor '{name}' is in {old} (type {type_}), which ggml removed. Use a file in {new}."
        )
    if type_ < _FUTURE_TYPES:
        from importlib.metadata import version

        return UnsupportedError(
            f"the tensor '{name}' has the type {type_}, which the installed gguf package ({version('gguf')}) does not "
            "support. Use another quantization of the model, such as Q8_0 or Q4_K_M, or update the package."
        )
    return CheckpointError(f"the tensor '{name}' has the unknown type {type_}. {REDOWNLOAD_HINT}")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _place(entry: tuple[str, tuple[int, ...], int, int], data_start: int, file_size: int) -> TensorInfo:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, shape, type_, offset = entry
    try:
        block, block_size = GGML_QUANT_SIZES[GGMLQuantizationType(type_)]
    except (ValueError, KeyError):
        raise _unsupported_type(name, type_) from None
    count = math.prod(shape)
    size = count // block * block_size
    start = data_start + offset
    if not shape or count == 0 or shape[-1] % block or start + size > file_size:
        raise CheckpointError(
            f"its {file_size:,} bytes cannot hold the tensor '{sanitize(name)}' of shape {shape} at byte {start:,}. "
            + REDOWNLOAD_HINT
        )
    return TensorInfo(name, shape, type_, start, size)
