"""Render pages as plain lines of text, for screen readers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.text import Text

from llama_scratch.render.drawings.drawing import Drawing
from llama_scratch.render.heatmaps import HIGH, HIGH_WITH_TEXTS, TILE, columns_shown, window
from llama_scratch.render.lines import json_line
from llama_scratch.render.page import (
    Cell,
    Code,
    Finding,
    Gallery,
    Heatmap,
    Page,
    PageBlock,
    Paragraph,
    Running,
    Table,
    written,
)
from llama_scratch.render.pooling import pooled, pooling

# Maximum number of columns of a map with a command that shows other columns.
_PLAIN_COLUMNS = 8


def plain(page: Page) -> Text:
    """Render a page as plain lines of text."""
    lines = [line for part in page.parts for line in _lines(part)]
    return Text("\n".join([*lines, page.source_line] if page.source else lines))


def _lines(part: PageBlock) -> Iterator[str]:
    match part:
        case Finding() | Paragraph():
            yield written(part.text)
        case Running(spoken=False):
            pass
        case Running():
            runs = groupby(part.pieces, key=lambda piece: piece.token)
            texts = ((token, "".join(piece.text for piece in run)) for token, run in runs)
            yield "".join(_quoted(text) if token else written(text) for token, text in texts)
            yield from (
                f"{_named(piece.text, piece.token)}: {written(piece.hover)}" for piece in part.pieces if piece.hover
            )
        case Table():
            yield from _table_lines(part)
        case Heatmap():
            yield from _map_lines(part)
        case Gallery():
            yield written(part.title)
            small = [pooled(heatmap, TILE[1], TILE[0]) for heatmap in part.maps]
            for heatmap in small:
                yield from _map_lines(heatmap)
            yield from list(filter(None, map(pooling, part.maps, small)))[:1]  # one note for all maps
        case Drawing():
            yield f"{written(part.title)}:"
            yield from map(written, part.spoken())
        case Code():
            yield f"{written(part.path)}, line {part.line}:"
            for n, line in enumerate(part.text.splitlines(), start=1):
                yield f"{part.first + n - 1}{' (here)' if n in part.marked else ''}: {written(line)}"


def _table_lines(part: Table) -> Iterator[str]:
    """Yield one line per row, with the column name before each value."""
    if part.title:
        yield f"{written(part.title)}:"
    names = [written(name.removeprefix(">")) for name in part.columns]
    for row in part.rows:
        yield ", ".join(filter(None, map(_said, names, row)))


def _said(name: str, cell: Cell) -> str:
    text = _quoted(cell.text) if cell.token else written(cell.text)
    return written(cell.said) or (f"{name} {text}".strip() if text else "")


def _quoted(text: str) -> str:
    return written(json_line(text))


def _map_lines(heatmap: Heatmap) -> Iterator[str]:
    """Yield one line per row, with the column label before each value."""
    partly = bool(heatmap.window.more)
    first, end = window(heatmap, _PLAIN_COLUMNS) if partly else (0, len(heatmap.columns))
    shown = pooled(heatmap, HIGH_WITH_TEXTS if heatmap.texts else HIGH, len(heatmap.columns) if partly else HIGH)
    what = f"{heatmap.title} ({heatmap.scale.legend})" if heatmap.scale.legend else heatmap.title
    yield f"{written(what)}:"
    for r in range(len(shown.rows)):
        if shown.hovers is not None:
            yield from filter(None, (shown.hover(r, c) for c in range(first, min(end, len(shown.columns)))))
        elif facts := list(_facts(shown, r, range(first, min(end, len(shown.columns))))):
            yield f"{_named(shown.rows[r], shown.row_tokens)}: {'; '.join(facts)}"
    if margin := shown.margin:
        facts = [f"{_named(row, shown.row_tokens)}: {text}" for row, text in zip(shown.rows, margin.texts, strict=True)]
        yield written(f"{margin.title}: {'; '.join(facts)}")
    if sentence := pooling(heatmap, shown):
        yield sentence
    if partly and (sentence := columns_shown(heatmap, first, end)):
        yield sentence


def _facts(heatmap: Heatmap, row: int, columns: range) -> Iterator[str]:
    for c in columns:
        value = heatmap.values[row][c]
        if value is not None:
            text = f" {_named(heatmap.texts[row][c], heatmap.tokens)}" if heatmap.texts else ""
            yield f"{_named(heatmap.columns[c], heatmap.tokens)}:{text} {heatmap.scale.figure(value)}"


def _named(label: str, token: bool) -> str:
    return _quoted(label) if token else written(label)
