"""JSON files of a model directory: of a bounded size, with each key once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, sanitize
from llama_scratch.system.small_files import read_bytes, without_mark


def read_object(path: Path, most: int = 1 << 20, *, required: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.
        most: Maximum size in bytes.
        required: Whether the file must exist; otherwise a missing one reads as an empty object.

    Raises:
        FileNotFoundError: If a required file does not exist.
        CheckpointError: If the file holds anything else.
    """
    try:
        data = read_bytes(path, most)
    except FileNotFoundError:
        if required:
            raise
        return {}
    return parse_object(without_mark(data, sanitize(path, 200)), path)


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that bytes of a file are. Raises `CheckpointError`, which names the file."""
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({sanitize(error)}); {REDOWNLOAD_HINT}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__}, expected an object; {REDOWNLOAD_HINT}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"'{sanitize(key)}' stands there twice")
    return found
