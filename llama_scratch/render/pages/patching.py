"""What interventions do: an answer before and after, and the map of causal tracing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Heatmap, Page, Paragraph, Running, Table
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # they bring torch
    from llama_scratch.microscope.effect import Effect
    from llama_scratch.microscope.patching import Trace


def effect(found: Effect) -> Page:
    """The next token before and after the interventions."""
    rows = tuple(
        (
            Cell(before.text, token=True),
            Cell(percent(before.probability)),
            Cell(percent(after.probability)),
            Cell("", bar=after.probability - before.probability, hover=_hover(before.probability, after.probability)),
        )
        for before, after in found.tokens
    )
    names = ", ".join(found.labels) or "nothing"
    table = Table(("token", ">before", ">after", ""), rows, f"With {names}")
    note = f"The answer afterwards is {found.kl_bits:.3g} bits (KL divergence) from the one before."
    return Page("Before and after", (table, Paragraph(note, "dim")), ("interventions",))


def _hover(before: float, after: float) -> str:
    return f"{percent(before)} → {percent(after)}"


def trace(found: Trace) -> Page:
    """A heat map over layers and positions of how far the answer moves."""
    first, second = found.first_answer, found.second_answer
    sentence = Running(
        (
            Cell("This text is answered with "),
            Cell(first.text, "bold", token=True),
            Cell(", the other with "),
            Cell(second.text, "bold", token=True),
            Cell(
                ". How far the answer moves to the other's when one activation of the other text is put into this one:"
            ),
        )
    )
    columns = tuple(
        a.text if a.id == b.id else f"{a.text}/{b.text}" for a, b in zip(found.first, found.second, strict=True)
    )
    last = len(found.moved) - 1
    rows = tuple(f"L{layer}" if layer < last else "end" for layer in range(len(found.moved)))
    heatmap = Heatmap("Moved, 0 to 1", rows, columns, found.moved, low=-1.0, high=1.0)
    note = (
        "A row is the residual stream before that layer, the last one the stream behind all of them; 0 leaves the "
        "answer, 1 moves it all the way. /patch L5@3 TEXT puts one of them in and lets it stay."
    )
    return Page("Causal tracing", (sentence, heatmap, Paragraph(note, "dim")), ("tracing",))
