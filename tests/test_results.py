"""JSON of results: no key overwrites another."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from llama_scratch.results import JsonResult, merged, to_json
from tests.helpers import ROOT


def test_objects_are_joined_in_order() -> None:
    assert list(merged({"a": 1}, {}, {"b": 2, "c": 3}).items()) == [("a", 1), ("b", 2), ("c", 3)]


def test_a_key_of_two_objects_is_an_error() -> None:
    """Even if the values are equal."""
    with pytest.raises(ValueError, match="'first' twice"):
        merged({"first": 1}, {"second": 2}, {"first": 1})


def test_a_field_under_the_name_of_another_is_an_error() -> None:
    @dataclass(frozen=True)
    class Twice(JsonResult):
        json_fields = ("a", "b as a")

        a: int
        b: int

    with pytest.raises(ValueError, match="'a' twice"):
        to_json(Twice(1, 2))


def test_json_objects_are_joined_only_by_merged() -> None:
    """`|` and `**` would keep the last of two values silently."""
    joined = re.compile(
        r"as_json\([^)]*\)\s*\|[^|]|\|\s*\(?[\w.]*(?:as_json|to_json)\(|\{[^{}]*\*\*[\w.]*(?:as|to)_json\("
    )
    for path in sorted((ROOT / "llama_scratch").rglob("*.py")):
        assert not joined.search(path.read_text(encoding="utf-8")), path
