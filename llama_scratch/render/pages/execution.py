"""A stop in the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import dedent
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Code, Finding, Page, PageBlock, Paragraph, Table
from llama_scratch.render.text import figure

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.execution import ExecutionTrace, Statement
    from llama_scratch.microscope.value_view import Number, ValueSummary

# Lines shown before and after the statement.
_MARGIN = 3
# Maximum number of values in the finding.
_NAMED = 3


def page(walk: ExecutionTrace, at: int, note: str = "") -> Page:
    """Return a page of a stop: its call stack, source lines and values.

    Args:
        walk: The trace.
        at: The stop.
        note: A sentence after the finding.
    """
    stop = walk.stops[at]
    first, text = stop.around(_MARGIN)
    marked = tuple(range(stop.first_line - first + 1, stop.last_line - first + 2))
    parts: list[PageBlock] = [
        Finding(finding(stop)),
        *([Paragraph(note)] if note else []),
        Paragraph(where(stop), "bold"),
        Paragraph(_count(walk, at), "dim"),
        Code(dedent(text), stop.path, first, marked, stop.file),
    ]
    if stop.values:
        parts.append(Table(("value", ""), tuple(row for value in stop.values for row in _rows(value))))
    if any(len(value.shape or ()) > 1 and value.first for value in stop.values):
        parts.append(Paragraph("first: the first numbers of the last token; with heads, of the last head.", "dim"))
    if stop.in_scope:
        parts.append(Paragraph(f"In scope for /step print: {', '.join(stop.in_scope)}.", "dim"))
    return Page("Forward pass", tuple(parts), (f"model.{stop.function}",))


def finding(stop: Statement) -> str:
    """State which line ran, where, and the shapes or values that it produced."""
    place = f"layer {stop.layer}" if stop.layer is not None else stop.module or "the network"
    ran = f"{stop.path.rpartition('/')[2]}:{stop.first_line} ran in {place}"
    results = [
        f"{'its result' if value.name == 'return' else value.name} is "
        + (value.text if value.shape is None else tuple_text(value.shape))
        for value in stop.values[:_NAMED]
    ]
    more = f" and {len(stop.values) - _NAMED} more values" if len(stop.values) > _NAMED else ""
    return f"{ran}: {', '.join(results)}{more}." if results else f"{ran}."


def where(stop: Statement) -> str:
    """Return the call stack: Transformer.forward › layer 3 › Attention.forward."""
    crumbs = []
    for function in (*stop.callers, stop.function):
        if function == "TransformerBlock.forward":
            crumbs.append(f"layer {stop.layer}")  # a block has no other methods
        else:
            crumbs.append(function)
    if stop.function == "TransformerBlock.forward":
        crumbs.append(stop.function)
    return " › ".join(crumbs)


def _count(walk: ExecutionTrace, at: int) -> str:
    count = f"stop {at + 1:,} of {len(walk.stops):,}"
    if module := walk.stops[at].module:
        count += f" · {module}"
    if walk.begin:
        count += f" · tokens from position {walk.begin:,} on; earlier ones are cached"
    return count


def _rows(value: ValueSummary) -> Iterator[tuple[Cell, Cell]]:
    name = Cell(value.name, "bold")
    if value.shape is None:
        yield name, Cell(value.text)
        return
    yield name, Cell(f"{tuple_text(value.shape)} {value.dtype}")
    if value.meaning:
        yield Cell(""), Cell(value.meaning, "dim")
    if value.mean is None or value.std is None or value.min is None or value.max is None:
        yield Cell(""), Cell("all inf or NaN" if value.infinite else "uninitialized memory", "dim")
    else:
        kind = " (magnitudes)" if value.dtype.startswith("complex") else ""
        yield Cell("  mean ± std"), Cell(f"{figure(value.mean)} ± {figure(value.std)}{kind}")
        yield Cell("  min … max"), Cell(f"{figure(value.min)} … {figure(value.max)}")
    if value.infinite:
        yield Cell("  inf or NaN"), Cell(f"{value.infinite:,} numbers")
    if value.first:
        more = ", …" if value.shape and value.shape[-1] > len(value.first) else ""
        yield Cell("  first"), Cell(", ".join(map(number, value.first)) + more)


def tuple_text(shape: tuple[int, ...]) -> str:
    """Format a shape as Python does, but without a trailing comma."""
    return f"({', '.join(map(str, shape))})"


def number(value: Number) -> str:
    """Format a number. Complex numbers are written as magnitude∠angle."""
    if isinstance(value, tuple):
        return f"{figure(value[0])}∠{figure(value[1])}"
    return "inf or NaN" if value is None else figure(value)
