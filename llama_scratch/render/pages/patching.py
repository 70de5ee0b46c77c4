"""The heat map of causal tracing."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Finding, Heatmap, Page, Paragraph, Running, written
from llama_scratch.render.scale import Scale

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.patching import Trace


# A position carries the answer if patching it alone changes the logit difference by at least this share.
_CARRIES = 0.5
# Maximum number of moves that the finding names.
_MOVES = 3


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
    heatmap = Heatmap(
        "Normalized logit difference",
        tuple(_row(trace, layer) for layer in range(len(trace.moved))),
        columns,
        trace.moved,
        Scale(-1.0, 1.0, "normalized logit difference", percent=True),
        says="{column} patched at {row}: {value} of the logit difference",
    )
    note = (
        "Rows are the residual stream before each layer, 'end' after the last one. 0: the logit difference of this "
        "text; 1: that of the other text. /patch L5@3 TEXT patches one of these activations."
    )
    return Page("Causal tracing", (Finding(finding(trace)), sentence, heatmap, Paragraph(note, "dim")), ("tracing",))


def finding(trace: Trace) -> str:
    """State which positions carry the answer, and between which layers it moves."""
    runs = [(at, list(rows)) for at, rows in groupby(range(len(trace.moved)), key=lambda row: _carrier(trace, row))]
    carried = [(at, rows[0], rows[-1]) for at, rows in runs if at is not None]
    if not carried:
        row, at = max(
            ((row, at) for row in range(len(trace.moved)) for at in range(len(trace.first))),
            key=lambda field: trace.moved[field[0]][field[1]],
        )
        most = f"{trace.moved[row][at]:.2f} of the logit difference, {_token(trace, at)} {_before(trace, row)}"
        return f"No single position carries the answer: patching one moves at most {most}."
    start, begin = carried[0][:2]
    late = f"No single position carries the answer at first; from {_row(trace, begin)} on, {_token(trace, start)} does."
    moves = [
        f"from {_token(trace, a)} to {_token(trace, b)} between {_layers(trace, last, next_)}"
        for (a, _, last), (b, next_, _) in pairwise(carried)
        if a != b
    ]
    if not moves:
        return late if begin else f"The answer stays at {_token(trace, start)} in all layers."
    way = f"moves {', then '.join(moves)}"
    if len(moves) > _MOVES:
        way = f"moves {len(moves)} times between positions, at last {moves[-1]}"
    return f"{late} Then it {way}." if begin else f"The answer {way}."


def _carrier(trace: Trace, row: int) -> int | None:
    """The only position that carries the answer in a row of the map, if there is one."""
    shares = trace.moved[row]
    at = max(range(len(shares)), key=shares.__getitem__)
    return at if shares[at] >= _CARRIES else None


def _token(trace: Trace, at: int) -> str:
    """A token of the text, with its position if it occurs more than once."""
    token = trace.first[at]
    several = sum(other.id == token.id for other in trace.first) > 1
    return written(token.text, token=True) + (f" at position {at}" if several else "")


def _row(trace: Trace, row: int) -> str:
    return f"L{row}" if row < len(trace.moved) - 1 else "end"


def _before(trace: Trace, row: int) -> str:
    return f"before layer {row}" if row < len(trace.moved) - 1 else "after the last layer"


def _layers(trace: Trace, row: int, next_row: int) -> str:
    end = next_row == len(trace.moved) - 1
    return f"layer {row} and the end" if end else f"layers {row} and {next_row}"
