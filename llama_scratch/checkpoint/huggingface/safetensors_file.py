"""Safetensors files: which tensors they hold, from their headers, every place checked against the files.

A file is the length of a JSON header, 8 bytes little-endian, the header, and the tensors one behind the other. A model
of several files has an index, which says for each tensor in which of them it lies.
Source: the format's description in huggingface/safetensors, README.md.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_scratch.checkpoint.fields import parse_object, read_object
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, ModelNotFoundError, UnsupportedError, sanitize
from llama_scratch.system.small_files import read_start

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# The format's name of a type → torch's, and its bytes.
TYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
# A header takes some 120 bytes a tensor, and the largest Llama has 1,138.
_MAX_HEADER = 1 << 22
_MAX_TENSORS = 1 << 12
_MAX_DIM = 1 << 40
# Bytes that are compared at a time.
_BLOCK = 1 << 20
# Older files carry the rotation table, which is computed here.
_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Entry:
    """One tensor: its shape, torch's name of its type, its bytes, its file, and the place of its first byte there."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    start: int

    def holds_the_same_as(self, other: Entry) -> bool:
        """Whether two tensors are equal byte by byte; NaN too. Reads no further than to the first difference."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        with self.file.open("rb") as own, other.file.open("rb") as its:
            own.seek(self.start)
            its.seek(other.start)
            left = self.nbytes
            while left and own.read(size := min(left, _BLOCK)) == its.read(size):
                left -= size
        return left == 0


def find_weights(directory: Path) -> tuple[Path, dict[str, Entry]]:
    """What describes the weights, the only file or the index, and all tensors by their names in it.

    Raises `ModelNotFoundError` where a file is missing and `CheckpointError` where one is wrong.
    """
    path, index = directory / WEIGHTS, directory / INDEX
    if path.is_file():
        return path, read_header(path)
    if index.is_file():
        return index, _read_index(index)
    if (directory / "pytorch_model.bin").exists() or (directory / "pytorch_model.bin.index.json").exists():
        raise UnsupportedError(
            f"{directory} holds its weights as pytorch_model.bin alone, expected {WEIGHTS}; "
            "save the model again with transformers, which writes that."
        )
    raise ModelNotFoundError(f"There is no {WEIGHTS} in {directory}, nor its index; fetch the model again.")


def _read_index(path: Path) -> dict[str, Entry]:
    places = read_object(path, _MAX_HEADER, required=True).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} has no weight_map, expected each tensor's file in it; {REDOWNLOAD_HINT}")
    for file in places.values():
        # A plain name: nothing that leads to another folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", file):
            raise CheckpointError(
                f"{path} names the file '{sanitize(file)}', expected one beside it; {REDOWNLOAD_HINT}"
            )
    entries: dict[str, Entry] = {}
    for file in dict.fromkeys(places.values()):
        shard = path.parent / file
        if not shard.is_file():
            raise ModelNotFoundError(f"There is no {file} in {path.parent}, which {path.name} names; fetch it again.")
        found = read_header(shard)
        if twice := entries.keys() & found:
            other = entries[min(twice)].file.name
            raise CheckpointError(
                f"{path}: '{sanitize(min(twice))}' is in {other} and in {file}, expected it once; {REDOWNLOAD_HINT}"
            )
        entries |= found
        _check_count(path, len(entries))
    wanted = {name: file for name, file in places.items() if not _IGNORED.fullmatch(name)}
    for name, file in wanted.items():
        if name not in entries or entries[name].file.name != file:
            raise CheckpointError(
                f"{path.parent / file} lacks '{sanitize(name)}', which {path.name} names; {REDOWNLOAD_HINT}"
            )
    for name, entry in entries.items():
        if name not in wanted:
            raise CheckpointError(f"{entry.file} holds '{sanitize(name)}', which {path.name} lacks; {REDOWNLOAD_HINT}")
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, the rotation table of older ones left out. Raises `CheckpointError`."""
    read_start(path)  # a git-lfs pointer or a web page is named for what it is
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8 or length > _MAX_HEADER:
            raise CheckpointError(
                f"{path} begins with {start!r} and has {size:,} bytes, expected a safetensors header; {REDOWNLOAD_HINT}"
            )
        header = parse_object(file.read(length), path)
    header.pop("__metadata__", None)
    _check_count(path, len(header))
    try:
        return _check_places(path, header, 8 + length, size)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_count(path: Path, count: int) -> None:
    if count > _MAX_TENSORS:
        raise CheckpointError(f"{path} names {count:,} tensors, expected at most {_MAX_TENSORS:,}; {REDOWNLOAD_HINT}")


def _check_places(path: Path, header: dict[str, Any], data_start: int, file_size: int) -> dict[str, Entry]:
    """The tensors must follow each other without a gap and fill the file to its end."""
    size = file_size - data_start
    entries = {name: _place(name, value) for name, value in header.items()}
    end = 0
    for name, (_, _, start, stop) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if start != end:
            raise CheckpointError(
                f"'{sanitize(name)}' begins at byte {start:,} of the data, expected {end:,}; {REDOWNLOAD_HINT}"
            )
        end = stop
    if end != size:
        raise CheckpointError(f"{size:,} bytes of data, expected {end:,} by its header; {REDOWNLOAD_HINT}")
    return {
        name: Entry(shape, dtype, stop - start, path, data_start + start)
        for name, (shape, dtype, start, stop) in entries.items()
        if not _IGNORED.fullmatch(name)
    }


def _place(name: str, value: Any) -> tuple[tuple[int, ...], str, int, int]:
    """(shape, torch's name of the type, first byte, byte behind the last one) of one tensor."""
    value = value if isinstance(value, dict) else {}
    kind, shape, place = (value.get(field) for field in ("dtype", "shape", "data_offsets"))
    if isinstance(kind, str) and kind not in TYPES:
        raise UnsupportedError(
            f"'{sanitize(name)}' is stored as {sanitize(kind)}, expected {', '.join(TYPES)}; "
            "use the unquantized model, or a GGUF file of it."
        )
    if not (isinstance(kind, str) and _are_sizes(shape) and _are_sizes(place) and len(place) == 2):
        raise CheckpointError(
            f"the header's entry for '{sanitize(name)}' is {sanitize(value)}, "
            f"expected dtype, shape and data_offsets; {REDOWNLOAD_HINT}"
        )
    dtype, each = TYPES[kind]
    start, stop = place
    if stop - start != (needed := math.prod(shape) * each):
        raise CheckpointError(
            f"'{sanitize(name)}' has {stop - start:,} bytes, expected {needed:,} for {kind} of the shape "
            f"{tuple(shape)}; {REDOWNLOAD_HINT}"
        )
    return tuple(shape), dtype, start, stop


def _are_sizes(values: Any) -> bool:
    """Whether something is a short list of numbers that can be sizes."""
    return isinstance(values, list) and len(values) <= 8 and all(type(n) is int and 0 <= n <= _MAX_DIM for n in values)
