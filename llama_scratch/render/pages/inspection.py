"""A prompt under the microscope."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, Paragraph, Running, Table
from llama_scratch.render.pages import patching
from llama_scratch.render.terminal import percent, took

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.inspection import Inspection


def page(found: Inspection) -> Page:
    """The prompt's tokens and the answer; of a changed network the answers before and after."""
    text = Running(tuple(Cell(token.text, token=True) for token in found.tokens))
    if found.interventions:
        changed = patching.effect(found.effect())
        return Page(changed.title, (text, *changed.parts), changed.source)
    prediction = found.prediction
    rows = tuple(
        (Cell(c.text, token=True), Cell(percent(c.probability)), Cell("", bar=c.probability)) for c in prediction.top
    )
    table = Table(("next token", ">prob.", ""), rows)
    return Page("A prompt and what comes next", (text, table, Paragraph(took(prediction), "dim")), ("inspection",))
