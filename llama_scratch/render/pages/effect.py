"""The effect of interventions on the prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Finding, Page, Paragraph, Table, written
from llama_scratch.render.text import changes, percent

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.effect import Effect
    from llama_scratch.results import Candidate


def page(effect: Effect) -> Page:
    """Return a page of the prediction before and after the interventions."""
    rows = tuple(
        (
            Cell(before.text, token=True),
            Cell(percent(before.probability)),
            Cell(percent(after.probability)),
            Cell("", bar=after.probability - before.probability, hover=_change(before, after)),
        )
        for before, after in effect.tokens
    )
    table = Table(("token", ">before", ">after", ""), rows)
    note = f"KL divergence (before ‖ after): {effect.kl_bits:.3g} bits."
    return Page("Before and after", (Finding(finding(effect)), table, Paragraph(note, "dim")), ("interventions",))


def finding(effect: Effect) -> str:
    """State how the answer changes, and which token is now the most probable."""
    best, *leading = effect.answers
    sentence = f"With {', '.join(effect.labels) or 'no intervention'}: {_change(*best)}"
    if leading:
        after = leading[0][1]
        sentence += f", and {written(after.text, token=True)} leads with {percent(after.probability)}"
    return f"{sentence}."


def _change(before: Candidate, after: Candidate) -> str:
    return f"{written(before.text, token=True)} {changes(before.probability, after.probability)}"
