"""A stop in the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import dedent
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Code, Page, PageBlock, Paragraph, Table, figure

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.execution import ExecutionTrace, Statement
    from llama_scratch.microscope.value_view import Number, ValueSummary

# Lines around the statement.
_MARGIN = 3


def page(walk: ExecutionTrace, at: int, note: str = "") -> Page:
    """Where the walk is, the lines that just ran, and what they made. note: what there is to say before that."""
    stop = walk.stops[at]
    first, text = stop.around(_MARGIN)
    marked = tuple(range(stop.first_line - first + 1, stop.last_line - first + 2))
    parts: list[PageBlock] = [
        *([Paragraph(note)] if note else []),
        Paragraph(where(stop), "bold"),
        Paragraph(_count(walk, at), "dim"),
        Code(dedent(text), stop.path, first, marked),
    ]
    if stop.values:
        parts.append(Table(("value", ""), tuple(row for value in stop.values for row in _rows(value))))
    if any(len(value.shape or ()) > 1 and value.first for value in stop.values):
        parts.append(
            Paragraph("first: what the last token begins with, in the last head where there are heads.", "dim")
        )
    if stop.in_scope:
        parts.append(Paragraph(f"/step print takes {', '.join(stop.in_scope)}.", "dim"))
    return Page("A step of the forward pass", tuple(parts), (f"model.{stop.function}",))


def where(stop: Statement) -> str:
    """The functions that a stop is in: Transformer.forward › layer 3 › Attention.forward."""
    crumbs = []
    for function in (*stop.callers, stop.function):
        if function == "TransformerBlock.forward":
            crumbs.append(f"layer {stop.layer}")  # there is nothing else of one
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
        count += f" · tokens from position {walk.begin:,} on, behind those in the cache"
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
        yield Cell(""), Cell("no numbers" if value.infinite else "memory that is taken and not written yet", "dim")
    else:
        kind = " (magnitudes)" if value.dtype.startswith("complex") else ""
        yield Cell("  mean ± std"), Cell(f"{figure(value.mean)} ± {figure(value.std)}{kind}")
        yield Cell("  min … max"), Cell(f"{figure(value.min)} … {figure(value.max)}")
    if value.infinite:
        yield Cell("  not finite"), Cell(f"{value.infinite:,} numbers")
    if value.first:
        more = ", …" if value.shape and value.shape[-1] > len(value.first) else ""
        yield Cell("  first"), Cell(", ".join(map(number, value.first)) + more)


def tuple_text(shape: tuple[int, ...]) -> str:
    """A shape as Python writes it, without the comma of a single size."""
    return f"({', '.join(map(str, shape))})"


def number(value: Number) -> str:
    """A number as it is shown; a complex one as magnitude∠angle."""
    if isinstance(value, tuple):
        return f"{figure(value[0])}∠{figure(value[1])}"
    return "not finite" if value is None else figure(value)
