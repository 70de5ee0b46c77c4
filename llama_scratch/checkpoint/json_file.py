"""JSON files of a model directory: read whole where their size is sensible, with each key but once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from llama_scratch.errors import FETCH_AGAIN, CheckpointError, printable


def read_object(path: Path, most: int = 1 << 20) -> dict[str, Any]:
    """The JSON object that a file of at most `most` bytes holds; none where there is no such file.

    Raises `CheckpointError` for anything else.
    """
    if not path.is_file():
        return {}
    if (size := path.stat().st_size) > most:
        raise CheckpointError(f"{path} has {size:,} bytes, expected at most {most:,}; {FETCH_AGAIN}")
    return parse_object(path.read_bytes(), path)


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that bytes of a file are. Raises `CheckpointError`, which names the file."""
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({printable(error)}); {FETCH_AGAIN}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__}, expected an object; {FETCH_AGAIN}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"'{printable(key)}' stands there twice")
    return found
