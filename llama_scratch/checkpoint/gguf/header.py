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

from llama_scratch.checkpoint.fields import Fields
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, UnsupportedError, sanitize
from llama_scratch.system.small_files import read_start


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `shape` as torch counts it, `start` and `size` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int


@dataclass(frozen=True)
class GGUFHeader:
    """The metadata and table of tensors of the file at `path`; every place in it lies within the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: list[TensorInfo]

    @property
    def elements(self) -> int:
        """Number of elements of all arrays in the metadata."""
        return sum(len(value) for value in self.metadata.values() if isinstance(value, list))


# GGUF's type number of a metadata value → struct's letter; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING_SIZE = struct.Struct("<Q")
# Elements of all arrays together: several times Llama 3's vocabulary, types of tokens and merges (536,659).
MAX_ELEMENTS = 1 << 21
# A Llama's file has some 40 keys, and the largest one 1,138 tensors.
_MAX_KEYS, _MAX_TENSORS = 1 << 12, 1 << 12
# Types that ggml removed → their names, and the type that replaces them: llama.cpp rearranges it when it loads.
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
# Numbers that ggml may give to types still to come; a larger one is damage.
_FUTURE_TYPES = 256


class _Cursor:
    """Reads values one after the other and never beyond the end.

    Args:
        data: The file.
        max_elements: Elements that all arrays together may have.
    """

    def __init__(self, data: mmap.mmap, max_elements: int):
        self.data = data
        self.position = 0
        self._elements_left = max_elements

    def take(self, size: int) -> int:
        """Step over `size` bytes and return where they start."""
        start = self.position
        if size > len(self.data) - start:
            raise CheckpointError(
                f"{len(self.data):,} bytes, expected {size:,} more at byte {start:,}; {REDOWNLOAD_HINT}"
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
                f"an array of {count:,} elements, expected at most {MAX_ELEMENTS:,} in all arrays; {REDOWNLOAD_HINT}"
            )
        self._elements_left -= count
        return self._strings(count) if kind == 8 else list(self.scalars(self._letter(kind), count))

    def _strings(self, count: int) -> list[str]:
        """The same as `string`, but several times faster: a vocabulary and its merges have some 400,000."""
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
                f"a metadata value of the unknown type {kind} at byte {self.position:,}; {REDOWNLOAD_HINT}"
            )
        return _SCALARS[kind]


def read_header(path: Path, max_elements: int = MAX_ELEMENTS) -> GGUFHeader:
    """Read metadata and tensor table of a GGUF file, version 2 or 3.

    Args:
        path: The file.
        max_elements: Elements that all arrays of the metadata together may have.

    Raises:
        UnsupportedError: For a file of another byte order, version or type of tensor.
        CheckpointError: For a file that is damaged or not GGUF.
    """
    read_start(path)  # a git-lfs pointer or a web page is named for what it is
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise CheckpointError(f"{path} has under 24 bytes, expected a GGUF file; {REDOWNLOAD_HINT}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read_header(path, _Cursor(data, max_elements))
            except UnsupportedError as error:
                raise UnsupportedError(f"{path}: {error}") from error
            except CheckpointError as error:
                raise CheckpointError(f"{path} is not a whole GGUF file: {error}") from error


def _read_header(path: Path, cursor: _Cursor) -> GGUFHeader:
    magic, version, n_tensors, n_metadata = struct.unpack_from("<4sIQQ", cursor.data, cursor.take(24))
    if magic != b"GGUF":
        raise CheckpointError(f"it begins with {magic!r}, expected GGUF; {REDOWNLOAD_HINT}")
    if version not in (2, 3):
        raise _unsupported_version(version)
    for count, limit, name in ((n_metadata, _MAX_KEYS, "metadata keys"), (n_tensors, _MAX_TENSORS, "tensors")):
        if count > limit:
            raise CheckpointError(f"{count:,} {name}, expected at most {limit:,}; {REDOWNLOAD_HINT}")
    metadata: dict[str, Any] = {}
    for _ in range(n_metadata):  # each takes bytes of the file, so a lie about their number soon ends
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"the metadata key '{sanitize(key)}' stands there twice; {REDOWNLOAD_HINT}")
        metadata[key] = cursor.value(cursor.scalar("I"))
    table = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.scalar("I")
        if n_dims > 4:
            raise CheckpointError(
                f"the tensor '{sanitize(name)}' has {n_dims} dimensions, expected at most 4; {REDOWNLOAD_HINT}"
            )
        dims, type_, offset = cursor.scalars("Q", n_dims), cursor.scalar("I"), cursor.scalar("Q")
        table.append((name, tuple(reversed(dims)), type_, offset))
    alignment = Fields(metadata).integer("general.alignment", default=32)
    if alignment % 8 or alignment & (alignment - 1):
        raise CheckpointError(f"general.alignment is {alignment}, expected a power of two from 8 on; {REDOWNLOAD_HINT}")
    data_start = _aligned(cursor.position, alignment)
    tensors = [_place(entry, data_start, len(cursor.data)) for entry in table]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise CheckpointError(f"a tensor stands there twice; {REDOWNLOAD_HINT}")
    # One lies behind the other and the last one ends the file, so that no damage sends a reader elsewhere.
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start != _aligned(end, alignment):
            raise CheckpointError(
                f"the tensor '{sanitize(tensor.name)}' begins at byte {tensor.start:,}, "
                f"expected it at {_aligned(end, alignment):,}; {REDOWNLOAD_HINT}"
            )
        end = tensor.start + tensor.size
    if len(cursor.data) not in (end, _aligned(end, alignment)):
        raise CheckpointError(
            f"{len(cursor.data):,} bytes, expected {end:,} by its table of tensors; {REDOWNLOAD_HINT}"
        )
    return GGUFHeader(path, metadata, tensors)


def _unsupported_version(version: int) -> CheckpointError:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, 2, 3):
        return UnsupportedError(
            f"version {version} is {swapped} in big-endian byte order, expected a little-endian file; convert it with "
            "'gguf-convert-endian FILE little' of the gguf package, or use a little-endian file."
        )
    if version == 1:
        return UnsupportedError(
            "it is GGUF version 1, expected version 2 or 3; convert the original model again with llama.cpp."
        )
    if 3 < version < 32:  # a later one
        return UnsupportedError(f"it is GGUF version {version}, expected version 2 or 3; use a file of version 3.")
    return CheckpointError(f"it has the version {version}, expected GGUF version 2 or 3; {REDOWNLOAD_HINT}")


def _unsupported_type(name: str, type_: int) -> CheckpointError:
    name = sanitize(name)
    if type_ in _REMOVED:
        old, new = _REMOVED[type_]
        return UnsupportedError(
            f"the tensor '{name}' is in {old} (type {type_}), which ggml removed; use a file in {new}."
        )
    if type_ < _FUTURE_TYPES:
        from importlib.metadata import version

        return UnsupportedError(
            f"the tensor '{name}' has the type {type_}, which the installed gguf package ({version('gguf')}) does not "
            "know; use another quantization of the model, such as Q8_0 or Q4_K_M, or update the package."
        )
    return CheckpointError(f"the tensor '{name}' has the unknown type {type_}; {REDOWNLOAD_HINT}")


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
            f"{file_size:,} bytes, expected the tensor '{sanitize(name)}' of shape {shape} at byte {start:,}; "
            + REDOWNLOAD_HINT
        )
    return TensorInfo(name, shape, type_, start, size)
