"""The picture of a residual stream on a web page: the values for its template.

The fields are an HTML grid, which adapts to the width of the screen. The arcs and the curve of ranks are SVG, stretched
over the grid. Their coordinates are columns and rows.
"""

from __future__ import annotations

import math
from typing import Any

from llama_scratch.render.page import written
from llama_scratch.render.report_page import Arcs, Stream
from llama_scratch.render.text import percent

# Maximum height of an arc as a fraction of the picture's rows. Width of an arc with a share of 1, in pixels.
_HIGHEST, _WIDEST = 0.2, 7
# Maximum number of columns of a picture that leaves room for blocks beside it.
_NARROW = 12
# Maximum number of rows with labels.
_LABELS = 40


def values(stream: Stream) -> dict[str, Any]:
    """The template's values for a stream."""
    heatmap, n_rows = stream.heatmap, len(stream.heatmap.rows)
    answer = written(stream.answer, token=True)
    rows = [_row(stream, r, answer) for r in reversed(range(n_rows))]
    arcs = [_arcs(each, stream) for each in stream.arcs]
    shown = next((each["hover"] for each in arcs if each["head"] == stream.shown), "")
    return {
        "title": written(heatmap.title),
        "tokens": [heatmap.column(c) for c in range(len(heatmap.columns))],
        "rows": rows,
        "n_rows": n_rows,
        "n_columns": len(heatmap.columns),
        "many": len(heatmap.columns) > _NARROW,
        "answer": answer,
        "curve": _curve(stream.ranks),
        "arcs": arcs,
        "shown": stream.shown,
        "said": shown or "Point at the name of a head to see its attention.",
    }


def _row(stream: Stream, row: int, answer: str) -> dict[str, Any]:
    heatmap, n_rows = stream.heatmap, len(stream.heatmap.rows)
    step = math.ceil(n_rows / _LABELS)
    last = len(heatmap.columns) - 1
    fields = []
    for column in range(len(heatmap.columns)):
        leads = column == last and stream.ranks[row] == 1
        text = heatmap.text(row, column) if row == _middle(stream, row, column) else ""
        if leads and row == n_rows - 1:
            text = f"{answer} {percent(stream.probability)}"
        turns = row + 1 < n_rows and _text(stream, row + 1, column) != _text(stream, row, column)
        names = ["leads" if leads else "", "turns" if turns else "", "last" if column == last else ""]
        fields.append(
            {
                "text": text,
                "names": " ".join(filter(None, names)),
                "share": round(heatmap.scale.level(heatmap.values[row][column]) or 0.0, 3),
                "hover": heatmap.hover(row, column),
            }
        )
    label = heatmap.rows[row] if row in (0, n_rows - 1) or (n_rows - 1 - row) % step == 0 else ""
    return {"label": label, "fields": fields, "rank": f"{stream.ranks[row]:,}" if label else ""}


def _text(stream: Stream, row: int, column: int) -> str:
    return stream.heatmap.texts[row][column] if stream.heatmap.texts else ""


def _middle(stream: Stream, row: int, column: int) -> int:
    """The middle of the run of rows that have the same text in a column."""
    first = last = row
    while first > 0 and _text(stream, first - 1, column) == _text(stream, row, column):
        first -= 1
    while last + 1 < len(stream.heatmap.rows) and _text(stream, last + 1, column) == _text(stream, row, column):
        last += 1
    return (first + last) // 2


def _curve(ranks: tuple[int, ...]) -> str:
    """The points of the curve of ranks, on a logarithmic scale from 0 to 1.

    Rank 1 is at the right.
    """
    worst = math.log(max(2, *ranks))
    rows = range(len(ranks))
    return " ".join(f"{1 - math.log(ranks[row]) / worst:.3f},{len(ranks) - row - 0.5}" for row in rows)


def _arcs(arcs: Arcs, stream: Stream) -> dict[str, Any]:
    """The paths of a head from each token, before the layer, to the last, after it."""
    n_rows, end = len(stream.heatmap.rows), len(stream.heatmap.columns) - 0.5
    y = n_rows - arcs.row - 0.5
    paths = []
    for column, share in arcs.links:
        x = max(0.0, column + 0.5)
        high = min(y + 1, _HIGHEST * n_rows * (0.4 + 0.6 * (end - x) / end)) if x < end else 0
        top = round(y - high * 4 / 3, 2)
        # If the last token attends to itself, the path is a loop.
        loop = f"M{end - 0.2} {y + 1}C{end - 0.2} {y - 1.5} {end} {y - 1.5} {end} {y}"
        path = f"M{x} {y + 1}C{x} {top} {end} {top} {end} {y}" if x < end else loop
        width, opacity = round(max(1.0, _WIDEST * share), 1), round(0.3 + 0.7 * share, 2)
        paths.append({"path": path, "width": width, "opacity": opacity})
    return {"head": arcs.head, "hover": written(arcs.hover), "paths": paths}
