"""The headers of safetensors files. Every offset is checked against the file size.

A file consists of the header's length (8 bytes, little-endian), a JSON header, and the contiguous tensors. If a model
has several files, an index maps each tensor to its file.
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
# The format's name of a dtype → torch's name, and its size in bytes.
TYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
# A header takes about 120 bytes per tensor, and the largest Llama (405B) has 1,137 tensors.
_MAX_HEADER = 1 << 22
_MAX_TENSORS = 1 << 12
_MAX_DIM = 1 << 40
# Number of bytes to compare at a time.
_BLOCK = 1 << 20
# Older files also contain the RoPE frequencies. They are ignored, because they are computed from the configuration.
_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Args:
        shape: Its shape.
        dtype: torch's name of its dtype.
        nbytes: Size in bytes.
        file: The file.
        start: Offset in the file, in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    start: int

    def holds_the_same_as(self, other: Entry) -> bool:
        """Compare two tensors bitwise, NaN included. Stops at the first difference."""
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
    """Find all tensors of a model.

    Args:
        directory: The model's directory.

    Returns:
        The path of the single weight file or of the index, and the tensors by name.

    Raises:
        ModelNotFoundError: If a file is missing.
        CheckpointError: If a file is damaged or not supported.
    """
    path, index = directory / WEIGHTS, directory / INDEX
    if path.is_file():
        return path, read_header(path)
    if index.is_file():
        return index, _read_index(index)
    if (directory / "pytorch_model.bin").exists() or (directory / "pytorch_model.bin.index.json").exists():
        raise UnsupportedError(
            f"{directory} holds its weights only as pytorch_model.bin, expected {WEIGHTS}. "
            "Save the model again with transformers, which writes safetensors."
        )
    raise ModelNotFoundError(f"{WEIGHTS} and its index not found in {directory}. Fetch the model again.")


def _read_index(path: Path) -> dict[str, Entry]:
    places = read_object(path, _MAX_HEADER, required=True).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} has no weight_map, which maps each tensor to its file. {REDOWNLOAD_HINT}")
    for file in places.values():
        # The name must not contain a path, which could lead out of the directory.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", file):
            raise CheckpointError(
                f"{path} names the file '{sanitize(file)}', expected a file in the same directory. {REDOWNLOAD_HINT}"
            )
    entries: dict[str, Entry] = {}
    for file in dict.fromkeys(places.values()):
        shard = path.parent / file
        if not shard.is_file():
            raise ModelNotFoundError(f"{file} not found in {path.parent}, but {path.name} names it. Fetch that file.")
        found = read_header(shard)
        if twice := entries.keys() & found:
            other = entries[min(twice)].file.name
            raise CheckpointError(f"{path}: '{sanitize(min(twice))}' is in both {other} and {file}. {REDOWNLOAD_HINT}")
        entries |= found
        _check_count(path, len(entries))
    wanted = {name: file for name, file in places.items() if not _IGNORED.fullmatch(name)}
    for name, file in wanted.items():
        if name not in entries or entries[name].file.name != file:
            raise CheckpointError(
                f"{path.parent / file} lacks '{sanitize(name)}', which {path.name} names. {REDOWNLOAD_HINT}"
            )
    for name, entry in entries.items():
        if name not in wanted:
            raise CheckpointError(f"{entry.file} holds '{sanitize(name)}', which {path.name} lacks. {REDOWNLOAD_HINT}")
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """Read the header of one file. RoPE frequencies in older files are skipped.

    Raises:
        UnsupportedError: If a tensor has an unsupported type.
        CheckpointError: If the file is damaged.
    """
    read_start(path)  # raises a specific error for a git-lfs pointer or a web page
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8 or length > _MAX_HEADER:
            raise CheckpointError(
                f"{path} starts with {start!r} and has {size:,} bytes, expected a safetensors header. {REDOWNLOAD_HINT}"
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
        raise CheckpointError(f"{path} names {count:,} tensors, expected at most {_MAX_TENSORS:,}. {REDOWNLOAD_HINT}")


def _check_places(path: Path, header: dict[str, Any], data_start: int, file_size: int) -> dict[str, Entry]:
    """Check that the tensors are contiguous and fill the file."""
    size = file_size - data_start
    entries = {name: _place(name, value) for name, value in header.items()}
    end = 0
    for name, (_, _, start, stop) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if start != end:
            raise CheckpointError(
                f"'{sanitize(name)}' starts at byte {start:,} of the data, expected {end:,}. {REDOWNLOAD_HINT}"
            )
        end = stop
    if end != size:
        raise CheckpointError(f"it has {size:,} bytes of data, expected {end:,} by its header. {REDOWNLOAD_HINT}")
    return {
        name: Entry(shape, dtype, stop - start, path, data_start + start)
        for name, (shape, dtype, start, stop) in entries.items()
        if not _IGNORED.fullmatch(name)
    }


def _place(name: str, value: Any) -> tuple[tuple[int, ...], str, int, int]:
    """Parse an entry into shape, torch's name of the dtype, start and end offset."""
    value = value if isinstance(value, dict) else {}
    kind, shape, place = (value.get(field) for field in ("dtype", "shape", "data_offsets"))
    if isinstance(kind, str) and kind not in TYPES:
        raise UnsupportedError(
            f"'{sanitize(name)}' is stored as {sanitize(kind)}, expected {', '.join(TYPES)}. "
            "Use the unquantized model, or a GGUF file of it."
        )
    if not (isinstance(kind, str) and _are_sizes(shape) and _are_sizes(place) and len(place) == 2):
        raise CheckpointError(
            f"the header's entry for '{sanitize(name)}' is {sanitize(value)}, "
            f"expected dtype, shape and data_offsets. {REDOWNLOAD_HINT}"
        )
    dtype, each = TYPES[kind]
    start, stop = place
    if stop - start != (needed := math.prod(shape) * each):
        raise CheckpointError(
            f"'{sanitize(name)}' has {stop - start:,} bytes, expected {needed:,} for the shape {tuple(shape)} in "
            f"{kind}. {REDOWNLOAD_HINT}"
        )
    return tuple(shape), dtype, start, stop


def _are_sizes(values: Any) -> bool:
    """Whether a value is a short list of integers that can be sizes."""
    return isinstance(values, list) and len(values) <= 8 and all(type(n) is int and 0 <= n <= _MAX_DIM for n in values)
