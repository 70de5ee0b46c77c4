"""Numbers of a value in the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, PageBlock, Paragraph, Table
from llama_scratch.render.pages.execution import number, tuple_text, where

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.execution import Statement
    from llama_scratch.microscope.value_view import ValueView


def page(view: ValueView, stop: Statement) -> Page:
    """Return a page of the numbers of a value.

    Args:
        view: The numbers.
        stop: The stop in the forward pass.
    """
    heading = Paragraph(f"{view.name}{view.index} in {where(stop)}", "bold")
    if view.shape is None:
        return Page("Value in the forward pass", (heading, Paragraph(view.text)), (f"model.{stop.function}",))
    of = f"Shape {tuple_text(view.whole or ())}, {view.dtype}."
    two = len(view.shape) > 1
    width = max(map(len, view.rows), default=0)
    # One dimension is wrapped into several rows.
    columns = ("", *(f">{column}" if two else f">+{column}" for column in range(width)))
    rows = tuple(
        (Cell(label, "dim"), *(Cell(number(value)) for value in row), *(Cell("") for _ in range(width - len(row))))
        for label, row in zip(view.labels, view.rows, strict=True)
    )
    parts: list[PageBlock] = [heading, Paragraph(of), Table(columns, rows)]
    if view.left_out:
        parts.append(Paragraph(f"Not all numbers are shown. Use an index, such as {view.name}[..., :8].", "dim"))
    return Page("Value in the forward pass", tuple(parts), (f"model.{stop.function}",))
