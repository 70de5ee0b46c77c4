"""The numbers of a value in the forward pass: a summary, or some rows and columns."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.results import JsonResult

# Number of values in a summary; columns and rows in a view.
_FIRST = 4
_COLUMNS, _ROWS = 4, 16

Number = float | tuple[float, float] | None
"""A complex number is (magnitude, angle in radians). None means infinity or NaN."""
Index = tuple[int | slice | EllipsisType, ...]


@dataclass(frozen=True)
class ValueSummary:
    """Summary of a value that a statement assigned.

    Attributes:
        name: The name of the variable.
        text: The value as text if it is not a tensor. The other fields are then empty.
        shape: The shape.
        dtype: The dtype.
        meaning: The names of the dimensions, from the comment of the statement.
        mean: Mean of the finite numbers (for complex numbers, of their magnitudes), if the memory is initialized.
        std: Population standard deviation of the same numbers.
        min: Minimum of the same numbers.
        max: Maximum of the same numbers.
        infinite: Number of infinite and NaN values.
        first: The first numbers of the last row, which belong to the last token (of the last head, if there are heads).
    """

    name: str
    text: str = ""
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    meaning: str = ""
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    infinite: int = 0
    first: tuple[Number, ...] = ()


@dataclass(frozen=True)
class ValueView(JsonResult):
    """Numbers of a variable at a stop.

    Attributes:
        name: The name of the variable.
        index: The index shown, as text. If more than two dimensions remain, the leading ones have the index -1.
        whole: The shape of the variable.
        shape: The shape at the requested index.
        dtype: The dtype.
        text: The value as text if it is not a tensor. The other fields are then empty.
        labels: The index at which each row starts.
        rows: At most 16 rows of at most 4 numbers (2 if complex). One dimension is wrapped into several rows.
        left_out: Whether there are more numbers than shown.
    """

    name: str
    index: str
    whole: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    dtype: str
    text: str
    labels: tuple[str, ...]
    rows: tuple[tuple[Number, ...], ...]
    left_out: bool


# --- Summaries ---------------------------------------------------------------------------------


def summaries(name: str, value: Any, meanings: Sequence[str], filled: bool) -> Iterator[ValueSummary]:
    """Yield the summary of a value, or of each element of a tuple.

    Args:
        name: The name of the variable.
        value: Its value.
        meanings: Shapes in the comment of the statement.
        filled: Whether the memory is initialized.
    """
    if isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value):
        for i, part in enumerate(value):
            yield from summaries(f"{name}[{i}]", part, meanings, filled)
    elif not isinstance(value, Tensor):
        yield ValueSummary(name, text=_plain(value))
    else:
        fitting = [meaning for meaning in meanings if meaning.count(",") + 1 == value.ndim]
        shape, meaning = tuple(value.shape), fitting[-1] if fitting else ""
        statistics = _statistics(value) if filled and value.numel() else {}
        yield ValueSummary(name, "", shape, _dtype(value), meaning, **statistics)


def _statistics(value: Tensor) -> dict[str, Any]:
    numbers = (value.abs() if value.is_complex() else value).float()
    finite = numbers[numbers.isfinite()] if not math.isfinite(numbers.sum()) else numbers
    first = _numbers(value[(-1,) * (value.ndim - 1)][:_FIRST] if value.ndim else value.reshape(1))
    statistics: dict[str, Any] = {"infinite": numbers.numel() - finite.numel(), "first": first}
    if finite.numel():
        std, mean = torch.std_mean(finite, correction=0)
        low, high = finite.aminmax()
        statistics |= {"mean": float(mean), "std": float(std), "min": float(low), "max": float(high)}
    return statistics


# --- Views --------------------------------------------------------------------------------------


def parsed(expression: str) -> tuple[str, Index]:
    """Parse a name with an optional index, without evaluating it.

    Raises `UsageError` for any other expression.
    """
    matched = re.fullmatch(r"\s*([^\W\d]\w*)\s*(\[.{0,200}\])?\s*", expression.replace("…", "..."))
    try:
        if matched is None:
            raise ValueError
        if matched[2] is None:
            return matched[1], ()
        node = ast.parse(f"_{matched[2]}", mode="eval").body
        if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
            raise ValueError
        return matched[1], tuple(map(_item, node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UsageError(
            f"'{sanitize(expression)}' cannot be printed. Use a name, optionally with an index of integers, slices "
            "and '...', such as q[0, -1, :, :8]."
        ) from None


def _item(node: ast.expr) -> int | slice | EllipsisType:
    match node:
        case ast.Constant(value=value) if value is ...:
            return ...
        case ast.Slice(lower, upper, step):
            return slice(*(None if part is None else _whole_number(part) for part in (lower, upper, step)))
    return _whole_number(node)


def _whole_number(node: ast.expr) -> int:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_whole_number(operand)
        case ast.Constant(value=int(value)) if type(value) is int:
            return value
    raise ValueError


def view_value(name: str, value: Any, index: Index) -> ValueView:
    """Return the numbers at an index of a value.

    Args:
        name: The name of the variable.
        value: Its value.
        index: The index.

    Raises:
        UsageError: If the value does not have that index.
    """
    written_index, rest = _written(index), index
    try:
        while isinstance(value, tuple) and rest:
            value, rest = value[rest[0]], rest[1:]  # type: ignore[index]  # '...' raises TypeError
        part = value[rest] if rest else value
        if rest and isinstance(part, Tensor) and not part.numel():
            raise IndexError
    except (IndexError, TypeError, ValueError, RuntimeError, OverflowError):
        raise UsageError(f"The index {written_index} is out of range: {name} is {_plain(value)}.") from None
    if not isinstance(part, Tensor):
        return ValueView(name, written_index, None, None, "", _plain(part), (), (), left_out=False)
    shape = tuple(part.shape)
    if part.ndim > 2:
        last = (-1,) * (part.ndim - 2)
        written_index, part = written_index + _written(last), part[last]
    columns = _COLUMNS // 2 if part.is_complex() else _COLUMNS
    if part.ndim == 2:
        rows = list(part[:_ROWS, :columns])
        labels = list(map(str, range(len(rows))))
    else:
        flat = part.reshape(-1)[: _ROWS * columns]
        labels = list(map(str, range(0, len(flat), columns)))
        rows = [flat[int(begin) : int(begin) + columns] for begin in labels]
    return ValueView(
        name=name,
        index=written_index,
        whole=tuple(value.shape),
        shape=shape,
        dtype=_dtype(part),
        text="",
        labels=tuple(labels),
        rows=tuple(map(_numbers, rows)),
        left_out=sum(row.numel() for row in rows) < part.numel(),
    )


def _written(index: Index) -> str:
    def part(item: int | slice | EllipsisType) -> str:
        if item is ...:
            return "..."
        if isinstance(item, slice):
            ends = ["" if end is None else str(end) for end in (item.start, item.stop)]
            return ":".join([*ends, str(item.step)] if item.step is not None else ends)
        return str(item)

    return f"[{', '.join(map(part, index))}]" if index else ""


def _numbers(row: Tensor) -> tuple[Number, ...]:
    if row.is_complex():
        pairs = zip(row.abs().tolist(), row.angle().tolist(), strict=True)
        return tuple(pair if math.isfinite(pair[0]) else None for pair in pairs)
    return tuple(number if math.isfinite(number) else None for number in row.float().tolist())


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def has_numbers(value: Any) -> bool:
    """Whether a variable is a tensor, a number, None or a tuple of these."""
    parts = value if isinstance(value, tuple) else (value,)
    return all(part is None or isinstance(part, Tensor | int | float) for part in parts)


def _plain(value: Any) -> str:
    """A value that is not a tensor, as short text."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, int | float | str | torch.Size):
        return sanitize(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_plain, value))})"
    return type(value).__name__
