"""The map of causal tracing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Heatmap, Page, Paragraph, Running

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.patching import Trace


def page(trace: Trace) -> Page:
    """A heat map over layers and positions of how far the answer moves."""
    first, second = trace.first_answer, trace.second_answer
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
        a.text if a.id == b.id else f"{a.text}/{b.text}" for a, b in zip(trace.first, trace.second, strict=True)
    )
    last = len(trace.moved) - 1
    rows = tuple(f"L{layer}" if layer < last else "end" for layer in range(len(trace.moved)))
    heatmap = Heatmap("Moved, 0 to 1", rows, columns, trace.moved, low=-1.0, high=1.0)
    note = (
        "A row is the residual stream before that layer, the last one the stream behind all of them; 0 leaves the "
        "answer, 1 moves it all the way. /patch L5@3 TEXT puts one of them in and lets it stay."
    )
    return Page("Causal tracing", (sentence, heatmap, Paragraph(note, "dim")), ("tracing",))
