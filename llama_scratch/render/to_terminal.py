"""Render pages on a terminal, with rich."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text
from rich.theme import Theme
from rich.tree import Tree

from llama_scratch.render.bars import TextWithBar, has_blocks
from llama_scratch.render.code import Excerpt
from llama_scratch.render.drawings.drawing import Drawing
from llama_scratch.render.heatmaps import Tiles, WideMap
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
from llama_scratch.render.shades import has_truecolor
from llama_scratch.render.surprise import terminal_styles
from llama_scratch.render.text import visible

# Minimum width of a column of bars in cells, including the gap before it.
_LEAST_BAR = 8


def view(page: Page) -> RenderableType:
    """Render a page, fitted to the width of the terminal."""
    parts: list[RenderableType] = [_block(part) for part in page.parts]
    if page.source:
        parts.append(Text(page.source_line, style="dim"))
    return _Styled(Group(*(Padding(part, (1, 0, 0, 1)) for part in parts), Text()))


class _Styled:
    """A view that defines the named styles for the terminal that it is printed on."""

    def __init__(self, view: RenderableType):
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with console.use_theme(Theme(terminal_styles(has_truecolor(console)))):
            yield from console.render(self.view, options)


# --- Blocks -----------------------------------------------------------------------------------


def _block(part: PageBlock) -> RenderableType:
    match part:
        case Finding():
            return Text(written(part.text), overflow="fold")
        case Paragraph():
            return Text(written(part.text), style=part.style, overflow="fold")
        case Running():
            return _running(part)
        case Table():
            return _tree(part) if part.levels else FittedTable(part)
        case Heatmap():
            return WideMap(part)
        case Gallery():
            return Group(Text(written(part.title), style="bold"), Text(), Tiles(part))
        case Code():
            return _code(part)
        case Drawing():
            return FittedDrawing(part)


def _text(cell: Cell) -> Text:
    return visible(cell.text, cell.style) if cell.token else Text(written(cell.text), style=cell.style)


def _running(part: Running) -> Text:
    """Render running text. A visible line break in a token also breaks the line."""
    line = Text(overflow="fold")
    for piece in part.pieces:
        line.append_text(_text(piece))
        if piece.token and "\n" in piece.text:
            line.append("\n")
    return line


def _code(part: Code) -> RenderableType:
    return Group(Text(written(part.location), style="bold"), Excerpt(part))


class FittedDrawing:
    """A drawing below its title, fitted to the width of the terminal."""

    def __init__(self, drawing: Drawing):
        self.drawing = drawing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(written(self.drawing.title), style="bold", overflow="fold")
        yield from self.drawing.lines(options.max_width, blocks=has_blocks(options))


# --- Tables -----------------------------------------------------------------------------------


class FittedTable:
    """A table. Unnamed columns of bars are left out if the terminal is too narrow."""

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
    cells = [
        _bars(column) if bars else [_text(cell) for cell in column]
        for column, bars in zip(columns, barred, strict=False)
    ]
    limit = part.scroll or len(part.rows)
    for row in list(zip(*cells, strict=True))[:limit]:
        grid.add_row(*row)
    parts: list[RenderableType] = [Text(written(part.title), style="bold")] if part.title else []
    parts.append(grid)
    if (rest := len(part.rows) - limit) > 0:
        parts.append(Text(f"and {rest:,} more", style="dim"))
    return Group(*parts)


def _tree(part: Table) -> RenderableType:
    """Render the rows as branches of a tree below the title."""
    nodes = [Tree(Text(written(part.title), style="bold"), guide_style="dim")]
    for row, level in zip(part.rows, part.levels, strict=True):
        label = Text(" ", overflow="fold").join(_text(cell) for cell in row if cell.text)
        del nodes[level + 1 :]
        nodes.append(nodes[-1].add(label))
    return nodes[0]


def _bars(column: Sequence[Cell]) -> list[RenderableType]:
    """Render a column of bars, each after its number. The numbers are aligned."""
    texts = [_text(cell) for cell in column]
    width = max(text.cell_len for text in texts)
    both = any((cell.bar or 0) < 0 for cell in column)
    for text in texts:
        text.align("right", width)
    return [TextWithBar(text, cell.bar, both) for text, cell in zip(texts, column, strict=True)]
