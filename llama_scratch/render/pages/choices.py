"""How probable each of some continuations is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, Paragraph, Table
from llama_scratch.render.text import counted, percent

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.choices import Choices


def page(choices: Choices) -> Page:
    """The choices, the most probable first, each with its share of the probability of all of them."""
    rows = []
    for i, choice in enumerate(choices.ranked):
        style, length = "" if i else "bold", counted(len(choice.tokens), "token")
        share, by_length = percent(choice.normalized), percent(choice.by_length)
        row = (
            Cell(choice.text, style, token=True),
            Cell(share, style, said=f"{share} of these choices"),
            Cell(by_length, said=f"{by_length} by length"),
            Cell("", bar=choice.normalized, hover=length, said=length),
        )
        rows.append(row)
    together = f"One of them comes next with a probability of {percent(choices.probability)}."
    table = Table(("choice", ">share", ">by length", ""), tuple(rows))
    return Page("Choices", (table, Paragraph(together, "dim")))
