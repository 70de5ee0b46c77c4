"""Probabilities of alternative continuations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, Paragraph, Table
from llama_scratch.render.text import counted, percent

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.choices import Choices


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
            Cell("", bar=choice.normalized, hover=length, said=length),
        )
        rows.append(row)
    note = (
        "share: softmax over the choices of their log-probabilities; per token: of the mean log-probability per "
        f"token. One of them follows with a probability of {percent(choices.probability)}."
    )
    table = Table(("choice", ">share", ">per token", ""), tuple(rows))
    return Page("Choices", (table, Paragraph(note, "dim")))
