"""Heat maps on a terminal: the layout of their fields, labels and legends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, zip_longest

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as Grid
from rich.text import Text

from llama_scratch.render.page import Gallery, Heatmap, written
from llama_scratch.render.pooling import pooled, pooling
from llama_scratch.render.shades import Shades
from llama_scratch.render.text import SPACE

# Maximum number of rows. Maps with texts may have more, because pooling would drop texts.
HIGH, HIGH_WITH_TEXTS = 48, 128
# Maximum number of columns and rows of a tile.
TILE = (10, 5)
# Minimum number of rows for column labels below the map too.
_FOOT = 10
# Minimum number of rows to fold into one line.
_FOLDED = 3
# Gap between tiles, and the minimum width of a tile.
_TILE_GAP, _LEAST_TILE = 2, 6


def _cut(text: str, width: int) -> str:
    """Cut or pad a text to exactly `width` cells."""
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


@dataclass(frozen=True)
class _Widths:
    """The widths of the parts of a map, in cells.

    Args:
        label: Width of the row labels.
        field: Width of a field, including the gap.
        complete: The column that is never cut off, or −1.
        extra: Additional width of that column.
        beside: Width of the texts beside the map, including the gap.
        room: Width that the columns share.
    """

    label: int
    field: int
    complete: int
    extra: int
    beside: int
    room: int

    @property
    def fits(self) -> int:
        """Number of columns that fit."""
        return max(1, (self.room - self.extra) // self.field)

    def column(self, index: int) -> int:
        """The width of a column."""
        return min(self.room, self.field + (self.extra if index == self.complete else 0))


class WideMap:
    """A heat map, fitted to the width of the terminal."""

    def __init__(self, heatmap: Heatmap):
        self.heatmap = heatmap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = self.heatmap
        texts = whole.texts is not None
        widths = _widths(whole, options.max_width)
        # Columns are pooled, unless that would lose texts or a part was requested. If a command shows other columns,
        # they are pooled only in a map more than four times as wide as the terminal.
        fits = widths.fits
        squeezed = not texts and whole.window.first is None and (not whole.window.more or len(whole.columns) > 4 * fits)
        high = HIGH_WITH_TEXTS if texts else HIGH
        shown = pooled(whole, high, fits if squeezed else len(whole.columns))
        first, end = window(whole, fits) if not squeezed else (0, len(shown.columns))
        drawing = _Drawing(Shades(shown, console, options), widths, range(first, end))
        yield Text(written(whole.title), style="bold", overflow="fold")
        for line in drawing.lines():
            line.no_wrap, line.overflow = True, "crop"
            if not drawing.shades.truecolor:
                line.rstrip()
            yield line
        yield Shades(whole, console, options).legend()
        for sentence in (
            f"Right: {whole.margin.title}." if whole.margin else "",
            pooling(whole, shown),
            columns_shown(whole, first, end) if not squeezed else "",
        ):
            if sentence:
                yield Text(sentence, style="dim")


def _widths(heatmap: Heatmap, width: int) -> _Widths:
    """Fit a map to the width of the terminal.

    Fields fit all texts if there is room, otherwise three quarters of them, up to a maximum width. The marked column is
    widened to fit all of its texts.
    """
    rows, columns = range(len(heatmap.rows)), range(len(heatmap.columns))
    label = min(max(4, min(16, width // 5)), max((cell_len(heatmap.row(r)) for r in rows), default=0))
    beside = 2 + max(map(cell_len, heatmap.margin.texts), default=0) if heatmap.margin else 0
    room = width - label - 1 - beside
    if heatmap.scale.kinds or heatmap.texts is None:
        field = 1 if heatmap.scale.kinds and 2 * len(columns) > room else 2
        return _Widths(label, field, -1, 0, beside, room)
    lengths = [[cell_len(heatmap.text(r, c)) for r in rows] for c in columns]
    needs = [2 + max([cell_len(heatmap.column(c)), *lengths[c]]) for c in columns]
    field = min(16, max(needs, default=2))
    if field * len(columns) > room:
        in_order = sorted(length for column in lengths for length in column) or [0]
        field = min(10, max(6 if heatmap.tokens else 3, 2 + in_order[3 * len(in_order) // 4]))
    complete = max((c for c in columns if any(heatmap.mark(r, c) for r in rows)), default=-1)
    extra = max(0, min(room, needs[complete]) - field) if complete >= 0 else 0
    return _Widths(label, field, complete, extra, beside, room)


def window(heatmap: Heatmap, fits: int) -> tuple[int, int]:
    """The range of columns to show, as (first, end).

    Args:
        heatmap: The heat map.
        fits: Number of columns that fit.
    """
    last = max(0, len(heatmap.columns) - fits)
    first = last if heatmap.window.first is None else max(0, min(heatmap.window.first, last))
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
    if heatmap.window.more:
        ways = [(max(0, first - shown), "earlier")] if first else []
        ways += [(end, "later")] if end < total else []
        sentence += "; " + ", ".join(f"{heatmap.window.more.format(start)} shows {which} ones" for start, which in ways)
    return sentence


class _Drawing:
    """The lines of a map.

    Args:
        shades: The shades of the map, which may be pooled.
        widths: The widths of its parts.
        columns: The columns to draw.
    """

    def __init__(self, shades: Shades, widths: _Widths, columns: range):
        self.shades, self.widths, self.columns = shades, widths, columns
        self.heatmap = shades.heatmap

    def lines(self) -> Iterator[Text]:
        """Yield the column labels and the rows. A tall map has the labels below it too."""
        kinds, texts = bool(self.heatmap.scale.kinds), self.heatmap.texts is not None
        field = self._letter if kinds else self._text if texts else self._shade
        rows = list(_folded(self.heatmap, self.columns))
        if kinds:
            heads = [self._numbers()]
        else:
            heads = list(self._tokens() if texts else self._upright())
            if self.heatmap.window.more and texts:  # the positions that the command takes
                numbers = "".join(f"{c:<{self.widths.column(c)}}" for c in self.columns)
                yield Text(" " * (self.widths.label + 2) + numbers, style="dim")
            yield from (head.copy() for head in heads)
        for run in rows:
            if len(run) > 1 and self.heatmap.fold:
                names = f"{self.heatmap.row(run[0])} to {self.heatmap.row(run[-1])}"
                yield Text(f"{' ' * self.widths.label} {names}: {written(self.heatmap.fold.note)}", style="dim italic")
                continue
            line = Text(_cut(self.heatmap.row(run[0]), self.widths.label) + " ", style="")
            line.stylize("dim")
            for column in self.columns:
                field(line, run[0], column)
            if self.heatmap.margin:
                line.append(f"{written(self.heatmap.margin.texts[run[0]]):>{self.widths.beside - 1}}", style="dim")
            yield line
        if kinds or len(rows) >= _FOOT:
            yield from heads

    def _tokens(self) -> Iterator[Text]:
        margin = " " * (self.widths.label + 2)
        names = (_cut(self.heatmap.column(c), self.widths.column(c) - 1) for c in self.columns)
        yield Text(margin + " ".join(names), style="cyan")

    def _upright(self) -> Iterator[Text]:
        names = [_upright(self.heatmap.column(c)) for c in self.columns]
        high = max(map(len, names), default=0)
        for across in zip_longest(*([" "] * (high - len(name)) + name for name in names)):
            margin = " " * (self.widths.label + 1)
            yield Text(margin + "".join(set_cell_size(char, 2) for char in across), style="cyan")

    def _numbers(self) -> Text:
        """A line with every fifth column label."""
        names = (self.heatmap.column(c) for c in self.columns[::5])
        line = "".join(_cut(name, 5 * self.widths.field) for name in names)
        return Text(" " * (self.widths.label + 1) + line, style="cyan")

    def _text(self, line: Text, row: int, column: int) -> None:
        line.append(*self.shades.shade(row, column))
        width = self.widths.column(column) - 2
        line.append(_cut(self.heatmap.text(row, column), width), style=self.shades.text_style(row, column))
        line.append(" ")

    def _letter(self, line: Text, row: int, column: int) -> None:
        line.append(_cut(self.heatmap.text(row, column), 1), style=self.shades.text_style(row, column))
        if self.widths.field > 1:
            line.append(*self.shades.shade(row, column))

    def _shade(self, line: Text, row: int, column: int) -> None:
        character, style = self.shades.shade(row, column)
        line.append(2 * character, style=style)


def _folded(heatmap: Heatmap, columns: range) -> Iterator[range]:
    """Yield ranges of rows: single rows, and runs of rows to fold into one line.

    The first and the last row are never folded.
    """
    count, fold = len(heatmap.rows), heatmap.fold

    def folds(row: int) -> bool:
        return fold is not None and 0 < row < count - 1 and all(fold.fields[row][c] for c in columns)

    for folded, run in groupby(range(count), key=folds):
        rows = list(run)
        if folded and len(rows) >= _FOLDED:
            yield range(rows[0], rows[-1] + 1)
        else:
            yield from (range(row, row + 1) for row in rows)


def _upright(text: str, max_characters: int = 6) -> list[str]:
    """The characters of a vertical label.

    Combining marks stay with their letters. A leading space is dropped.
    """
    stack: list[str] = []
    for char in text.removeprefix(SPACE) or text:
        if stack and not cell_len(char):
            stack[-1] += char
        else:
            stack.append(char)
    return stack if len(stack) <= max_characters else [*stack[: max_characters - 1], "⋮"]


class Tiles:
    """Small heat maps, side by side.

    A line has as many maps as the gallery has columns, if they fit, otherwise as many as fit.
    """

    def __init__(self, gallery: Gallery):
        self.maps, self.columns = gallery.maps, gallery.columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        titles = [written(heatmap.title) for heatmap in self.maps]
        width = min(16, max(TILE[0], max(map(cell_len, titles), default=0)))
        across = (options.max_width + _TILE_GAP) // (width + _TILE_GAP)
        if self.columns > across and (options.max_width + _TILE_GAP) // self.columns - _TILE_GAP >= _LEAST_TILE:
            width = (options.max_width + _TILE_GAP) // self.columns - _TILE_GAP
        if self.columns:
            across = min(self.columns, (options.max_width + _TILE_GAP) // (width + _TILE_GAP))
        tiles = [
            _tile(Shades(pooled(heatmap, TILE[1], min(width, TILE[0])), console, options), title, width)
            for heatmap, title in zip(self.maps, titles, strict=True)
        ]
        yield _grid(tiles, max(1, across), width)
        if self.maps and self.maps[0].scale.legend:
            yield Shades(self.maps[0], console, options).legend()
        if any(pooling(heatmap, pooled(heatmap, TILE[1], TILE[0])) for heatmap in self.maps):
            yield Text("Max-pooled: each character is the strongest value of its block.", style="dim")


def _grid(tiles: list[Text], across: int, width: int) -> Grid:
    grid = Grid.grid(padding=(0, _TILE_GAP, 0, 0), pad_edge=False)
    for _ in range(across):
        grid.add_column(width=width)
    for first in range(0, len(tiles), across):
        grid.add_row(*tiles[first : first + across])
    return grid


def _tile(shades: Shades, title: str, width: int) -> Text:
    words = title.split(" ")
    while len(words) > 1 and cell_len(" ".join(words)) > width:  # shorten the title, at most to its first word
        words.pop()
    tile = Text(_cut(" ".join(words), width), style="", no_wrap=True)
    for r in range(len(shades.heatmap.rows)):
        tile.append("\n")
        for c in range(len(shades.heatmap.columns)):
            tile.append(*shades.shade(r, c))
    return tile.append("\n")
