"""Pages on a terminal, and as plain lines.

Shades have shapes, so that nothing is said by color alone: positive ones are blocks, negative ones strokes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, zip_longest

from rich.cells import cell_len, set_cell_size
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table as Grid
from rich.text import Text
from rich.tree import Tree

from llama_scratch.render.lines import json_line
from llama_scratch.render.page import (
    Cell,
    Code,
    Gallery,
    Heatmap,
    Page,
    PageBlock,
    Paragraph,
    Running,
    Table,
    figure,
    pooled,
    pooling,
    written,
)
from llama_scratch.render.text import SPACE, visible

_BLOCKS = " ▏▎▍▌▋▊▉█"
# From nothing to the most; what stands at a terminal that has no blocks.
_POSITIVE, _POSITIVE_ASCII = " ·░▒▓█", " .:+*#"
_NEGATIVE, _NEGATIVE_ASCII = " ‐-=≡≣", " `-=xX"
# Up to this shade the first of the characters, and so on.
_LIMITS = (0.02, 0.1, 0.3, 0.55, 0.8)
# Rows of a map; what has texts in its fields is not to lose them.
_HIGH, _HIGH_WITH_TEXTS = 48, 128
_TILE = (10, 5)
# Cells of a column of bars, and of the gap in front of it.
_LEAST_BAR = 8
# Columns that plain lines have of a map that a command shows in parts.
_PLAIN_COLUMNS = 8


def view(page: Page) -> RenderableType:
    """The page, as wide as the terminal."""
    parts: list[RenderableType] = [_shown(part) for part in page.parts]
    if page.source:
        parts.append(Text(_source(page), style="dim"))
    return Group(*(Padding(part, (1, 0, 0, 1)) for part in parts), Text())


def plain(page: Page) -> Text:
    """The page as lines that a screen reader reads well."""
    lines = [line for part in page.parts for line in _lines(part)]
    return Text("\n".join([*lines, _source(page)] if page.source else lines))


def _source(page: Page) -> str:
    return "Source: " + ", ".join(f"/source {name}" for name in page.source)


# --- The parts --------------------------------------------------------------------------------


def _shown(part: PageBlock) -> RenderableType:
    match part:
        case Paragraph():
            return Text(written(part.text), style=part.style, overflow="fold")
        case Running():
            return _running(part)
        case Table():
            return _tree(part) if part.levels else _Rows(part)
        case Heatmap():
            return _Map(part)
        case Gallery():
            return Group(Text(written(part.title), style="bold"), Text(), _Tiles(part))
        case Code():
            return _code(part)


def _text(cell: Cell) -> Text:
    return visible(cell.text, cell.style) if cell.token else Text(written(cell.text), style=cell.style)


def _running(part: Running) -> Text:
    """Line breaks within tokens are visible, and break the line."""
    shown = Text(overflow="fold")
    for piece in part.pieces:
        shown.append_text(_text(piece))
        if piece.token and "\n" in piece.text:
            shown.append("\n")
    return shown


def _code(part: Code) -> RenderableType:
    code = Syntax(
        "\n".join(map(written, part.text.splitlines())),
        part.language,
        theme="ansi_dark",
        background_color="default",
        line_numbers=True,
        start_line=part.first,
        highlight_lines={part.first + line - 1 for line in part.marked},
        word_wrap=True,
    )
    return Group(Text(f"{written(part.path)}:{part.first}", style="bold"), code)


# --- Tables -----------------------------------------------------------------------------------


class _Rows:
    """A table; where the terminal is too narrow for them, without columns that have nothing but bars."""

    def __init__(self, table: Table):
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = range(len(self.table.columns))
        told = [i for i in columns if self.table.columns[i] or any(row[i].text for row in self.table.rows)]
        rows = tuple(tuple(row[i] for i in told) for row in self.table.rows)
        bare = replace(self.table, columns=tuple(self.table.columns[i] for i in told), rows=rows)
        room = options.max_width - Measurement.get(console, options, _table(bare)).maximum
        yield _table(bare if len(told) < len(columns) and room < _LEAST_BAR else self.table)


def _table(part: Table) -> RenderableType:
    barred = [any(row[i].bar is not None for row in part.rows) for i in range(len(part.columns))]
    grid = Grid(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", expand=any(barred))
    for name, bars in zip(part.columns, barred, strict=True):
        if name.startswith(">") and not bars:
            grid.add_column(Text(written(name[1:])), justify="right", no_wrap=True)
        else:
            grid.add_column(Text(written(name.removeprefix(">"))), overflow="fold", ratio=1 if bars else None)
    columns = zip(*part.rows, strict=True) if part.rows else ()
    shown = [
        _bars(column) if bars else [_text(cell) for cell in column]
        for column, bars in zip(columns, barred, strict=False)
    ]
    limit = part.scroll or len(part.rows)
    for row in list(zip(*shown, strict=True))[:limit]:
        grid.add_row(*row)
    parts: list[RenderableType] = [Text(written(part.title), style="bold")] if part.title else []
    parts.append(grid)
    if (rest := len(part.rows) - limit) > 0:
        parts.append(Text(f"and {rest:,} more", style="dim"))
    return Group(*parts)


def _tree(part: Table) -> RenderableType:
    """The rows as branches, under the title."""
    nodes = [Tree(Text(written(part.title), style="bold"), guide_style="dim")]
    for row, level in zip(part.rows, part.levels, strict=True):
        label = Text(" ", overflow="fold").join(_text(cell) for cell in row if cell.text)
        del nodes[level + 1 :]
        nodes.append(nodes[-1].add(label))
    return nodes[0]


def _bars(column: Sequence[Cell]) -> list[RenderableType]:
    """A column's bars after their numbers, which are aligned."""
    texts = [_text(cell) for cell in column]
    width = max(text.cell_len for text in texts)
    both = any((cell.bar or 0) < 0 for cell in column)
    for text in texts:
        text.align("right", width)
    return [_Barred(text, cell.bar, both) for text, cell in zip(texts, column, strict=True)]


class _Barred:
    """A text and a bar behind it; where `both`, to both sides of a middle."""

    def __init__(self, text: Text, bar: float | None, both: bool):
        self.text, self.bar, self.both = text, bar, both

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(
            min(self.text.cell_len + 6, options.max_width), min(self.text.cell_len + 42, options.max_width)
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self.text.copy()
        if shown.plain:
            shown.append(" ")
        room = min(options.max_width - shown.cell_len, 41)
        if self.bar is not None and room > 1:
            bar = max(-1.0, min(1.0, self.bar))
            blocks = _blocks(options)
            if self.both:
                half = (room - 1) // 2
                shown.append((_back(-bar, half, blocks) if bar < 0 else "").rjust(half), style="red")
                shown.append("│" if blocks else "|", style="dim")
                shown.append(_forth(bar, half, blocks), style="cyan")
            else:
                shown.append(_forth(bar, room - 1, blocks), style="cyan")
        shown.rstrip()
        shown.no_wrap, shown.overflow = True, "crop"
        yield shown


def _blocks(options: ConsoleOptions) -> bool:
    return options.encoding.startswith("utf")


def _forth(share: float, width: int, blocks: bool) -> str:
    if not blocks:
        return "#" * round(width * max(0.0, share))
    eighths = round(8 * width * max(0.0, share))
    return ("█" * (eighths // 8) + _BLOCKS[eighths % 8]).rstrip()


def _back(share: float, width: int, blocks: bool) -> str:
    """There are halves only of the blocks that begin at the right."""
    if not blocks:
        return "#" * round(width * share)
    halves = round(2 * width * share)
    return "▐" * (halves % 2) + "█" * (halves // 2)


# --- Heat maps --------------------------------------------------------------------------------


def _shade(level: float | None, blocks: bool) -> tuple[str, str]:
    """A shade's character and style, of −1 to 1."""
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
    """A text in exactly so many cells."""
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


class _Map:
    """A heat map in as many columns as the terminal has."""

    def __init__(self, heatmap: Heatmap):
        self.heatmap = heatmap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole, width, blocks = self.heatmap, options.max_width, _blocks(options)
        most = max(4, min(16, width // 5))
        label = min(most, max(map(cell_len, map(whole.row, range(len(whole.rows)))), default=0))
        texts = whole.texts is not None
        room = width - label - 1
        field = _field(whole, room) if texts else 2
        fits = max(1, room // field)
        # What is far wider than the terminal is shown whole, where nobody asked for a part and no text gets lost.
        squeezed = not texts and whole.first is None and (not whole.more or len(whole.columns) > 4 * fits)
        high = _HIGH_WITH_TEXTS if texts else _HIGH
        shown = pooled(whole, high, fits if squeezed else len(whole.columns))
        first, end = _window(whole, fits) if not squeezed else (0, len(shown.columns))
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
            _where(whole, first, end) if not squeezed else "",
        ):
            if sentence:
                yield Text(sentence, style="dim")


def _window(heatmap: Heatmap, fits: int) -> tuple[int, int]:
    """The first column that is shown and the one behind the last."""
    last = max(0, len(heatmap.columns) - fits)
    first = last if heatmap.first is None else max(0, min(heatmap.first, last))
    return first, min(first + fits, len(heatmap.columns))


def _where(heatmap: Heatmap, first: int, end: int) -> str:
    """Which columns are shown, where that is not all, and how to see the others."""
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
    """Cells of a field with its shade and the gap behind it: all texts stand in it whole where there is room for that,
    else three quarters of them."""
    texts = [cell_len(heatmap.text(r, c)) for r in range(len(heatmap.rows)) for c in range(len(heatmap.columns))]
    longest = min(16, 2 + max([*texts, *(cell_len(heatmap.column(c)) for c in range(len(heatmap.columns)))], default=0))
    if longest * len(heatmap.columns) <= room:
        return longest
    return min(10, max(6 if heatmap.tokens else 3, 2 + sorted(texts)[3 * len(texts) // 4]))


def _with_texts(heatmap: Heatmap, first: int, end: int, label: int, field: int, blocks: bool) -> Iterator[Text]:
    """A line for each row: its label, then in each field a shade and the text."""
    columns = range(first, end)
    if heatmap.more:  # which counts positions
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
    """The labels of the columns from top to bottom, then a line for each row, two cells a field."""
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


def _upright(text: str, most: int = 6) -> list[str]:
    """A label's characters from top to bottom, marks with the letters that they sit on; no space in front."""
    stack: list[str] = []
    for char in text.removeprefix(SPACE) or text:
        if stack and not cell_len(char):
            stack[-1] += char
        else:
            stack.append(char)
    return stack if len(stack) <= most else [*stack[: most - 1], "⋮"]


class _Tiles:
    """Small heat maps, as many beside each other as fit."""

    def __init__(self, gallery: Gallery):
        self.maps = gallery.maps

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks = _blocks(options)
        titles = [written(heatmap.title) for heatmap in self.maps]
        width = min(16, max(_TILE[0], max(map(cell_len, titles), default=0)))
        tiles = [_tile(heatmap, title, width, blocks) for heatmap, title in zip(self.maps, titles, strict=True)]
        yield Columns(tiles, padding=(0, 2), width=width)
        if any(pooling(heatmap, pooled(heatmap, _TILE[1], _TILE[0])) for heatmap in self.maps):
            yield Text("Each character is the strongest of the values in its place.", style="dim")


def _tile(heatmap: Heatmap, title: str, width: int, blocks: bool) -> Text:
    small = pooled(heatmap, _TILE[1], _TILE[0])
    shown = Text(_cut(title, width), style="", no_wrap=True)
    for r in range(len(small.rows)):
        shown.append("\n")
        for c in range(len(small.columns)):
            shown.append(*_shade(small.level(r, c), blocks))
    return shown.append("\n")


# --- Plain lines ------------------------------------------------------------------------------


def _lines(part: PageBlock) -> Iterator[str]:
    match part:
        case Paragraph():
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
            small = [pooled(heatmap, _TILE[1], _TILE[0]) for heatmap in part.maps]
            for heatmap in small:
                yield from _map_lines(heatmap)
            yield from list(filter(None, map(pooling, part.maps, small)))[:1]  # one says it of all
        case Code():
            yield f"{written(part.path)}, line {part.first}:"
            for n, line in enumerate(part.text.splitlines(), start=1):
                yield f"{part.first + n - 1}{' (here)' if n in part.marked else ''}: {written(line)}"


def _table_lines(part: Table) -> Iterator[str]:
    """A line for each row, with the names of its columns."""
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
    """A line for each row: columns with their values."""
    partly = bool(heatmap.more)
    first, end = _window(heatmap, _PLAIN_COLUMNS) if partly else (0, len(heatmap.columns))
    shown = pooled(heatmap, _HIGH_WITH_TEXTS if heatmap.texts else _HIGH, len(heatmap.columns) if partly else _HIGH)
    yield f"{written(heatmap.title)}:"
    for r in range(len(shown.rows)):
        if shown.hovers is not None:
            yield from filter(None, (shown.hover(r, c) for c in range(first, min(end, len(shown.columns)))))
        elif facts := list(_facts(shown, r, range(first, min(end, len(shown.columns))))):
            yield f"{_named(shown.rows[r], shown.row_tokens)}: {'; '.join(facts)}"
    if sentence := pooling(heatmap, shown):
        yield sentence
    if partly and (sentence := _where(heatmap, first, end)):
        yield sentence


def _facts(heatmap: Heatmap, row: int, columns: range) -> Iterator[str]:
    for c in columns:
        value = heatmap.values[row][c]
        if value is not None:
            text = f" {_named(heatmap.texts[row][c], heatmap.tokens)}" if heatmap.texts else ""
            yield f"{_named(heatmap.columns[c], heatmap.tokens)}:{text} {figure(value)}"


def _named(label: str, token: bool) -> str:
    return _quoted(label) if token else written(label)
