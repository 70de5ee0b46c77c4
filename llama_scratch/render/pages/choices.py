"""Probabilities of alternative continuations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Finding, Page, Paragraph, Table, written
from llama_scratch.render.text import counted, percent

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.choices import Choices

# A choice leads clearly if it has at least this share of all choices.
_CLEAR = 0.5


def page(choices: Choices) -> Page:
    """Return a page of the choices, most probable first."""
    rows = []
    for i, choice in enumerate(choices.ranked):
        style, length = "" if i else "bold", counted(len(choice.tokens), "token")
        share, by_length = percent(choice.normalized), percent(choice.by_length)
        row = (
            Cell(choice.text, style, token=True),
            Cell(share, style),
            Cell(by_length),
            Cell(
                "",
                bar=choice.normalized,
                hover=f"{written(choice.text, token=True)}: {share} of all choices; {length}",
                said=length,
            ),
        )
        rows.append(row)
    note = (
        "share: softmax over the choices of their log-probabilities; per token: of the mean log-probability per "
        f"token. One of them follows with a probability of {percent(choices.probability)}."
    )
    table = Table(("choice", ">share", ">per token", ""), tuple(rows))
    return Page("Choices", (Finding(finding(choices)), table, Paragraph(note, "dim")))


def finding(choices: Choices) -> str:
    """State which choice leads, how clearly, and whether it also leads per token."""
    best = choices.ranked[0]
    name = written(best.text, token=True)
    share = f"{percent(best.normalized)} of the probability of the {len(choices.choices)} choices"
    if best.normalized >= _CLEAR:
        sentence = f"{name} leads with {share}."
    else:
        sentence = f"No choice has half of the probability: {name} leads with {share}."
    longest = max(choices.choices, key=lambda choice: choice.by_length)
    if longest.by_length > best.by_length:
        sentence += f" Per token, {written(longest.text, token=True)} leads."
    return sentence
