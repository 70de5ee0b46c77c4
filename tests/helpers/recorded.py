"""Results as JSON files: dataclasses with numbers, texts and tuples, and nothing that runs."""

from __future__ import annotations

import importlib
import json
from dataclasses import fields, is_dataclass
from typing import Any


def to_json(results: dict[str, object]) -> str:
    """Write results as JSON, one line each. Floats keep 5 digits."""
    lines = [f"{json.dumps(name)}: {json.dumps(_encoded(result))}" for name, result in results.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(text: str) -> dict[str, Any]:
    """Read the results of `to_json`."""
    return {name: _decoded(result) for name, result in json.loads(text).items()}


def _encoded(value: object) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if is_dataclass(value) and not isinstance(value, type):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        # A field with an underscore refers to the model.
        kept = [field.name for field in fields(value) if not field.name.startswith("_")]
        return {"class": name, "fields": {field: _encoded(getattr(value, field)) for field in kept}}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, tuple | list):
        return [_encoded(item) for item in value]
    if isinstance(value, dict):
        return {"items": [[_encoded(key), _encoded(item)] for key, item in value.items()]}
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{type(value).__name__} is not recorded")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_decoded, value))
    if not isinstance(value, dict):
        return value
    if "class" in value:
        module, _, name = value["class"].partition(":")
        result = object.__new__(getattr(importlib.import_module(module), name))
        for field, item in value["fields"].items():
            object.__setattr__(result, field, _decoded(item))
        return result
    if "bytes" in value:
        return bytes.fromhex(value["bytes"])
    return {_decoded(key): _decoded(item) for key, item in value["items"]}
