"""The effect of interventions on the prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, Paragraph, Table
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.effect import Effect


def page(effect: Effect) -> Page:
    """Return a page of the prediction before and after the interventions."""
    rows = tuple(
        (
            Cell(before.text, token=True),
            Cell(percent(before.probability)),
            Cell(percent(after.probability)),
            Cell("", bar=after.probability - before.probability, hover=_hover(before.probability, after.probability)),
        )
        for before, after in effect.tokens
    )
    names = ", ".join(effect.labels) or "nothing"
    table = Table(("token", ">before", ">after", ""), rows, f"With {names}")
    note = f"KL divergence (before ‖ after): {effect.kl_bits:.3g} bits."
    return Page("Before and after", (table, Paragraph(note, "dim")), ("interventions",))


def _hover(before: float, after: float) -> str:
    return f"{percent(before)} → {percent(after)}"
