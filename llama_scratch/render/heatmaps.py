"""Heat maps on a terminal.

Positive values are block characters and negative values are strokes, so the map can be read without color.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as Grid
from rich.text import Text

from llama_scratch.render.bars import has_blocks
from llama_scratch.render.page import Gallery, Heatmap, figure, pooled, pooling, written
from llama_scratch.render.text import SPACE

# From weakest to strongest, with and without Unicode.
_POSITIVE, _POSITIVE_ASCII = " ·░▒▓█", " .:+*#"
_NEGATIVE, _NEGATIVE_ASCII = " ‐-=≡≣", " `-=xX"
# Upper limits of the first five shades.
_LIMITS = (0.02, 0.1, 0.3, 0.55, 0.8)
# Maximum number of rows. Maps with texts may have more, because pooling would drop texts.
HIGH, HIGH_WITH_TEXTS = 48, 128
TILE = (10, 5)
# Gap between tiles, and the minimum width of a tile.
_TILE_GAP, _LEAST_TILE = 2, 6


def _shade(level: float | None, blocks: bool) -> tuple[str, str]:
    """The character and the style for a level of −1 to 1."""
    if level is None:
        return " ", ""
    step = sum(abs(level) > limit for limit in _LIMITS)
    style = ("dim", "dim", "", "", "", "bold")[step]
    if level < 0:
        return (_NEGATIVE if blocks else _NEGATIVE_ASCII)[step], f"{style} red".strip()
    return (_POSITIVE if blocks else _POSITIVE_ASCII)[step], f"{style} green".strip()


def _text_style(level: float | None) -> str:
    if level is None:
        return ""
    color = "red" if level < 0 else "green"
    strength = abs(level)
    return "dim" if strength < 0.1 else "" if strength < 0.4 else color if strength < 0.75 else f"bold {color}"


def _cut(text: str, width: int) -> str:
    """Cut or pad a text to exactly `width` cells."""
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


class WideMap:
    """A heat map, fitted to the width of the terminal."""

    def __init__(self, heatmap: Heatmap):
        self.heatmap = heatmap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole, width, blocks = self.heatmap, options.max_width, has_blocks(options)
        widest_label = max(4, min(16, width // 5))
        label = min(widest_label, max(map(cell_len, map(whole.row, range(len(whole.rows)))), default=0))
        texts = whole.texts is not None
        room = width - label - 1
        field = _field(whole, room) if texts else 2
        fits = max(1, room // field)
        # A map far wider than the terminal is pooled, unless part of it was requested or a text would be lost.
        squeezed = not texts and whole.first is None and (not whole.more or len(whole.columns) > 4 * fits)
        high = HIGH_WITH_TEXTS if texts else HIGH
        shown = pooled(whole, high, fits if squeezed else len(whole.columns))
        first, end = window(whole, fits) if not squeezed else (0, len(shown.columns))
        yield Text(written(whole.title), style="bold", overflow="fold")
        lines = (
            _with_texts(shown, first, end, label, field, blocks) if texts else _shades(shown, first, end, label, blocks)
        )
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"
            line.rstrip()
            yield line
        for sentence in (
            _legend(whole, blocks),
            pooling(whole, shown),
            columns_shown(whole, first, end) if not squeezed else "",
        ):
            if sentence:
                yield Text(sentence, style="dim")


def window(heatmap: Heatmap, fits: int) -> tuple[int, int]:
    """The range of columns to show, as (first, end).

    Args:
        heatmap: The heat map.
        fits: Number of columns that fit.
    """
    last = max(0, len(heatmap.columns) - fits)
    first = last if heatmap.first is None else max(0, min(heatmap.first, last))
    return first, min(first + fits, len(heatmap.columns))


def columns_shown(heatmap: Heatmap, first: int, end: int) -> str:
    """Say which columns are shown and how to see the others; "" if all are shown.

    Args:
        heatmap: The heat map.
        first: First column shown.
        end: End of the range of columns shown, exclusive.
    """
    total, shown = len(heatmap.columns), end - first
    if shown == total:
        return ""
    sentence = f"{'positions' if heatmap.tokens else 'columns'} {first} to {end - 1} of {total:,}"
    if heatmap.more:
        ways = [(max(0, first - shown), "earlier")] if first else []
        ways += [(end, "later")] if end < total else []
        sentence += "; " + ", ".join(f"{heatmap.more.format(start)} shows {which} ones" for start, which in ways)
    return sentence


def _legend(heatmap: Heatmap, blocks: bool) -> str:
    positive = (_POSITIVE if blocks else _POSITIVE_ASCII)[1:]
    if not heatmap.signed:
        return f"{figure(heatmap.low)} {positive} {figure(heatmap.high)}"
    reach = figure(max(-heatmap.low, heatmap.high))
    negative = (_NEGATIVE if blocks else _NEGATIVE_ASCII)[:0:-1]
    return f"-{reach} {negative} 0 {positive} {reach}"


def _field(heatmap: Heatmap, room: int) -> int:
    """The width of a field in cells, including the shade and the gap.

    All texts fit if there is room for them, otherwise three quarters of them.
    """
    texts = [cell_len(heatmap.text(r, c)) for r in range(len(heatmap.rows)) for c in range(len(heatmap.columns))]
    longest = min(16, 2 + max([*texts, *(cell_len(heatmap.column(c)) for c in range(len(heatmap.columns)))], default=0))
    if longest * len(heatmap.columns) <= room:
        return longest
    return min(10, max(6 if heatmap.tokens else 3, 2 + sorted(texts)[3 * len(texts) // 4]))


def _with_texts(heatmap: Heatmap, first: int, end: int, label: int, field: int, blocks: bool) -> Iterator[Text]:
    """Yield the column labels, then one line per row: its label, then a shade and a text per field."""
    columns = range(first, end)
    if heatmap.more:  # the command takes a position
        yield Text(" " * (label + 2) + "".join(f"{c:<{field}}" for c in columns), style="dim")
    head = Text(" " * (label + 2))
    for c in columns:
        head.append(_cut(heatmap.column(c), field - 1) + " ", style="cyan")
    yield head
    for r in range(len(heatmap.rows)):
        line = Text(_cut(heatmap.row(r), label) + " ", style="")
        line.stylize("dim")
        for c in columns:
            level = heatmap.level(r, c)
            line.append(*_shade(level, blocks))
            line.append(_cut(heatmap.text(r, c), field - 2) + " ", style=_text_style(level))
        yield line


def _shades(heatmap: Heatmap, first: int, end: int, label: int, blocks: bool) -> Iterator[Text]:
    """Yield the vertical column labels, then one line per row with two cells per field."""
    columns = range(first, end)
    names = [_upright(heatmap.column(c)) for c in columns]
    high = max(map(len, names), default=0)
    for across in zip_longest(*([" "] * (high - len(name)) + name for name in names)):
        yield Text(" " * (label + 1) + "".join(set_cell_size(char, 2) for char in across), style="cyan")
    for r in range(len(heatmap.rows)):
        line = Text(_cut(heatmap.row(r), label) + " ", style="")
        line.stylize("dim")
        for c in columns:
            char, style = _shade(heatmap.level(r, c), blocks)
            line.append(2 * char, style=style)
        yield line


def _upright(text: str, max_characters: int = 6) -> list[str]:
    """The characters of a vertical label. Combining marks stay with their letters; a leading space is dropped."""
    stack: list[str] = []
    for char in text.removeprefix(SPACE) or text:
        if stack and not cell_len(char):
            stack[-1] += char
        else:
            stack.append(char)
    return stack if len(stack) <= max_characters else [*stack[: max_characters - 1], "⋮"]


class Tiles:
    """Small heat maps: the gallery's number of columns if there is room for them, otherwise as many as fit."""

    def __init__(self, gallery: Gallery):
        self.maps, self.columns = gallery.maps, gallery.columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks = has_blocks(options)
        titles = [written(heatmap.title) for heatmap in self.maps]
        width = min(16, max(TILE[0], max(map(cell_len, titles), default=0)))
        across = (options.max_width + _TILE_GAP) // (width + _TILE_GAP)
        if self.columns > across and (options.max_width + _TILE_GAP) // self.columns - _TILE_GAP >= _LEAST_TILE:
            width = (options.max_width + _TILE_GAP) // self.columns - _TILE_GAP
        if self.columns:
            across = min(self.columns, (options.max_width + _TILE_GAP) // (width + _TILE_GAP))
        tiles = [_tile(heatmap, title, width, blocks) for heatmap, title in zip(self.maps, titles, strict=True)]
        yield _grid(tiles, max(1, across), width)
        if any(pooling(heatmap, pooled(heatmap, TILE[1], TILE[0])) for heatmap in self.maps):
            yield Text("Max-pooled: each character is the strongest value of its block.", style="dim")


def _grid(tiles: list[Text], across: int, width: int) -> Grid:
    grid = Grid.grid(padding=(0, _TILE_GAP, 0, 0), pad_edge=False)
    for _ in range(across):
        grid.add_column(width=width)
    for first in range(0, len(tiles), across):
        grid.add_row(*tiles[first : first + across])
    return grid


def _tile(heatmap: Heatmap, title: str, width: int, blocks: bool) -> Text:
    small = pooled(heatmap, TILE[1], min(width, TILE[0]))
    words = title.split(" ")
    while len(words) > 1 and cell_len(" ".join(words)) > width:  # a narrow tile has only the head's name
        words.pop()
    tile = Text(_cut(" ".join(words), width), style="", no_wrap=True)
    for r in range(len(small.rows)):
        tile.append("\n")
        for c in range(len(small.columns)):
            tile.append(*_shade(small.level(r, c), blocks))
    return tile.append("\n")
