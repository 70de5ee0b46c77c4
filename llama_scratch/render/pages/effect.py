"""The effect of interventions on the prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Finding, Page, Paragraph, Table, written
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
    table = Table(("token", ">before", ">after", ""), rows, f"With {_names(effect)}")
    note = f"KL divergence (before ‖ after): {effect.kl_bits:.3g} bits."
    return Page("Before and after", (Finding(finding(effect)), table, Paragraph(note, "dim")), ("interventions",))


def finding(effect: Effect) -> str:
    """Say how far the answer falls, and which token is the answer after the interventions."""
    before, after = effect.answers[0]
    name, change = written(before.text, token=True), after.probability - before.probability
    shares = percent(before.probability), percent(after.probability)
    if shares[0] == shares[1]:
        moves = f"stays at {shares[0]}"
    else:
        moves = f"{'rises' if change > 0 else 'falls'} from {shares[0]} to {shares[1]}"
    if len(effect.answers) == 1:
        return f"With {_names(effect)}, {name} {moves} and remains the answer."
    new = effect.answers[1][1]
    answer = f"{written(new.text, token=True)} ({percent(new.probability)})"
    return f"With {_names(effect)}, {name} {moves}, and the answer becomes {answer}."


def _names(effect: Effect) -> str:
    return ", ".join(effect.labels) or "nothing"


def _hover(before: float, after: float) -> str:
    return f"{percent(before)} → {percent(after)}"
