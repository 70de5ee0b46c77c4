"""Compare a reader's result with the expected one, and say in one sentence how they differ."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llama_scratch.errors import sanitize

MAX_DISTANCE = 1e-4  # relative L2 distance: float32 rounding is below it, every mistake above


def difference(result: Any, expected: Any) -> str:
    """Describe how a result differs from the expected one; "" if they are equal within rounding.

    Args:
        result: A reader's result, of any type.
        expected: A tensor, number, text, list, set or tuple.
    """
    if isinstance(expected, tuple):
        return _tuples(result, expected)
    if isinstance(expected, Tensor):
        return _tensors(result, expected)
    if isinstance(expected, float):
        return _numbers(result, expected)
    if type(result) is not type(expected):
        return f"it returns {kind(result)}, expected {kind(expected)}"
    return "" if result == expected else f"it returns {_short(result)}, expected {_short(expected)}"


def equal(result: Any, expected: Any) -> bool:
    """Whether two results are equal within rounding."""
    return not difference(result, expected)


def distance(result: Tensor, expected: Tensor) -> float:
    """The relative L2 distance, ‖result − expected‖ / ‖expected‖. NaN and infinity give infinity."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = result.to(wide), expected.to(wide)
    apart, size = float((a - b).norm()), float(b.norm())
    return apart / max(size, 1e-30) if math.isfinite(apart) else math.inf


def distances(result: Tensor, expected: Tensor) -> list[float]:
    """The relative L2 distance of each row (position) of two tensors of the same shape."""
    return [distance(a, b) for a, b in zip(result, expected, strict=True)]


def kind(value: Any) -> str:
    """Describe the type of a value: "a tensor of shape (5, 64)", "a list", "None"."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _tuples(result: Any, expected: tuple[Any, ...]) -> str:
    if not isinstance(result, tuple) or len(result) != len(expected):
        found = f"{len(result)} values" if isinstance(result, tuple) else kind(result)
        return f"it returns {found}, expected a tuple of {len(expected)} values"
    for number, (one, other) in enumerate(zip(result, expected, strict=True), start=1):
        if text := difference(one, other):
            return f"{text} (value {number} of {len(expected)})"
    return ""


def _numbers(result: Any, expected: float) -> str:
    if isinstance(result, Tensor) and result.numel() == 1:
        result = result.item()
    if isinstance(result, bool) or not isinstance(result, int | float):
        return f"it returns {kind(result)}, expected a number"
    if math.isclose(result, expected, rel_tol=MAX_DISTANCE, abs_tol=1e-9):
        return ""
    return f"it returns {result:.6g}, expected {expected:.6g}"


def _tensors(result: Any, expected: Tensor) -> str:
    if not isinstance(result, Tensor) or result.shape != expected.shape:
        return f"it returns {kind(result)}, expected {kind(expected)}"
    if _family(result) != _family(expected):
        return f"it returns {_family(result)} numbers, expected {_family(expected)} ones"
    if distance(result, expected) <= MAX_DISTANCE:
        return ""
    if expected.dim() < 2:
        places = [i for i, far in enumerate(distances(result, expected)) if far > MAX_DISTANCE]
        i = places[0] if places else 0
        more = f", and {len(places) - 1} more differ" if len(places) > 1 else ""
        return f"element {i} is {_number(result[i])}, expected {_number(expected[i])}{more}"
    return by_position(distances(result, expected))


def by_position(apart: list[float]) -> str:
    """Say which positions differ, from the distance at each: the pattern tells mistakes apart."""
    wrong = [position for position, far in enumerate(apart) if far > MAX_DISTANCE]
    largest = max(apart)
    how_far = "NaN or infinity" if math.isinf(largest) else f"relative L2 distance up to {largest:.2g}"
    if not wrong:  # small differences that add up
        return f"all positions differ slightly ({how_far})"
    if len(wrong) == len(apart):
        return f"every position differs, also the first ({how_far})"
    if wrong == list(range(wrong[0], len(apart))):
        right = "position 0 is right" if wrong[0] == 1 else f"positions 0 to {wrong[0] - 1} are right"
        return f"{right}, and all later ones differ ({how_far})"
    return f"{len(wrong)} of {len(apart)} positions differ, the first one at {wrong[0]} ({how_far})"


def _family(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "floating-point" if tensor.is_floating_point() else "integer"


def _number(value: Tensor) -> str:
    return f"{value.item():.5g}"


def _short(value: Any) -> str:
    return sanitize(repr(sorted(value) if isinstance(value, set) else value))
