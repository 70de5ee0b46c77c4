"""Untrusted fields of model files: bounded JSON objects and checked values.

A JSON object must be within a size limit and must not repeat a key.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, sanitize
from llama_scratch.system.small_files import read_bytes, without_mark

_REQUIRED: Any = object()
# Larger than any value in a model, and small enough that the product of two values cannot overflow a tensor's size.
_MAX_INTEGER = 1 << 24


def read_object(path: Path, max_bytes: int = 1 << 20, *, required: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.
        max_bytes: Maximum size in bytes.
        required: Whether the file must exist. If not, the result for a missing file is an empty dictionary.

    Raises:
        FileNotFoundError: If a required file does not exist.
        CheckpointError: If the file does not hold a JSON object.
    """
    try:
        data = read_bytes(path, max_bytes)
    except FileNotFoundError:
        if required:
            raise
        return {}
    return parse_object(without_mark(data, sanitize(path, 200)), path)


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: Content of the file, in UTF-8.
        path: The file to name in errors.

    Raises:
        CheckpointError: If the data is not a JSON object, or repeats a key.
    """
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({sanitize(error)}). {REDOWNLOAD_HINT}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object. {REDOWNLOAD_HINT}")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key '{sanitize(key)}' is repeated")
    return content


@dataclass(frozen=True)
class Fields:
    """The fields of a model file, each checked when it is read.

    An error message is one sentence that does not name the file.
    """

    values: Mapping[str, Any]

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise CheckpointError(f"the field {name} is missing.")
        return default

    def integer(self, name: str, default: Any = _REQUIRED, *, limit: int = _MAX_INTEGER) -> int:
        """Return an integer from 1 to `limit`. A float such as 8192.0 is accepted too.

        Args:
            name: Name of the field.
            default: Returned if the field is missing or null. Without a default, the field is required.
            limit: Maximum value.

        Raises:
            CheckpointError: If a required field is missing, or the value is not such an integer.
        """
        if (value := self._get(name, default)) is default:
            return cast(int, value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise CheckpointError(f"the field {name} is {sanitize(value)}, expected an integer from 1 to {limit}.")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a positive number.

        Args:
            name: Name of the field.
            default: See `integer`.

        Raises:
            CheckpointError: If a required field is missing, or the value is not a positive number.
        """
        value = self._get(name, default)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            raise CheckpointError(f"the field {name} is {sanitize(value)}, expected a positive number.")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Return a boolean.

        Args:
            name: Name of the field.
            default: Returned if the field is missing or null.

        Raises:
            CheckpointError: If the value is not true or false.
        """
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"the field {name} is {sanitize(value)}, expected true or false.")
        return value
