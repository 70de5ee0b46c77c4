"""The heat map of causal tracing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Heatmap, Page, Paragraph, Running

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.patching import Trace


def page(trace: Trace) -> Page:
    """Return a page with the normalized logit difference per layer and position."""
    first, second = trace.first_answer, trace.second_answer
    sentence = Running(
        (
            Cell("Prediction: "),
            Cell(first.text, "bold", token=True),
            Cell("; for the other text: "),
            Cell(second.text, "bold", token=True),
            Cell(". Normalized logit difference if one activation is patched from the other text:"),
        )
    )
    columns = tuple(
        a.text if a.id == b.id else f"{a.text}/{b.text}" for a, b in zip(trace.first, trace.second, strict=True)
    )
    last = len(trace.moved) - 1
    rows = tuple(f"L{layer}" if layer < last else "end" for layer in range(len(trace.moved)))
    heatmap = Heatmap("Normalized logit difference", rows, columns, trace.moved, low=-1.0, high=1.0)
    note = (
        "Rows are the residual stream before each layer, 'end' after the last one. 0: the logit difference of this "
        "text; 1: that of the other text. /patch L5@3 TEXT patches one of these activations."
    )
    return Page("Causal tracing", (sentence, heatmap, Paragraph(note, "dim")), ("tracing",))
