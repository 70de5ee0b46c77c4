"""Max-pooling of heat maps that are too large to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from llama_scratch.render.page import Heatmap, Window

_T = TypeVar("_T")


def pooled(heatmap: Heatmap, rows: int, columns: int) -> Heatmap:
    """Max-pool a heat map to a maximum size.

    Each block of fields becomes one field, with the value farthest from 0 and the labels of the first row and column.

    Args:
        heatmap: The heat map.
        rows: Maximum number of rows.
        columns: Maximum number of columns.
    """
    if len(heatmap.rows) <= rows and len(heatmap.columns) <= columns:
        return heatmap
    down, across = _blocks(len(heatmap.rows), rows), _blocks(len(heatmap.columns), columns)

    def strength(place: tuple[int, int]) -> float:
        value = heatmap.values[place[0]][place[1]]
        return -1.0 if value is None or math.isnan(value) else abs(value)

    fields = [[max(((r, c) for r in high for c in wide), key=strength) for wide in across] for high in down]

    def kept(grid: Sequence[Sequence[_T]]) -> tuple[tuple[_T, ...], ...]:
        return tuple(tuple(grid[r][c] for r, c in row) for row in fields)

    margin, fold = heatmap.margin, heatmap.fold
    return replace(
        heatmap,
        rows=tuple(heatmap.rows[high[0]] for high in down),
        columns=tuple(heatmap.columns[wide[0]] for wide in across),
        values=kept(heatmap.values),
        texts=heatmap.texts and kept(heatmap.texts),
        hovers=heatmap.hovers and kept(heatmap.hovers),
        marked=heatmap.marked and kept(heatmap.marked),
        window=Window(),
        margin=margin and replace(margin, texts=tuple(margin.texts[high[0]] for high in down)),
        fold=fold and replace(fold, fields=kept(fold.fields)),
    )


def _blocks(length: int, max_blocks: int) -> list[range]:
    """Split range(length) into at most `max_blocks` ranges of nearly equal length."""
    count = min(length, max_blocks)
    return [range(i * length // count, (i + 1) * length // count) for i in range(count)]


def pooling(whole: Heatmap, shown: Heatmap) -> str:
    """Describe in one sentence how `pooled` reduced a map; "" if it did not.

    Args:
        whole: The map before pooling.
        shown: The map after pooling.
    """
    high, wide = (
        math.ceil(len(a) / len(b)) if b else 1 for a, b in ((whole.rows, shown.rows), (whole.columns, shown.columns))
    )
    if len(whole.rows) == len(shown.rows) and len(whole.columns) == len(shown.columns):
        return ""
    size = f"{len(whole.rows):,} × {len(whole.columns):,}"
    return f"{size} values, max-pooled: the strongest of each block of about {high} × {wide}."
