"""The data model of a view: a page made of blocks.

`to_terminal`, `to_plain`, `to_html` and `to_png` render it. Styles are rich's style names, limited to the terminal's 16
colors, and the named styles of `surprise`. Each renderer maps styles to its own colors. Color never carries information
on its own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from llama_scratch.render.drawings.drawing import Drawing
from llama_scratch.render.scale import Scale
from llama_scratch.render.text import visible


@dataclass(frozen=True)
class Cell:
    """A cell of a table, or a piece of running text.

    Args:
        text: The text, unescaped.
        style: A style of rich, or a named style of `surprise`.
        token: Whether the text is a token. If so, white space and control characters are made visible.
        bar: Length of a bar after the text: 0 to 1, or −1 to 1 for a bar to either side of a center line.
        hover: Tooltip on a web page.
        said: Replacement for the column name and the text in plain output.
    """

    text: str
    style: str = ""
    token: bool = False
    bar: float | None = None
    hover: str = ""
    said: str = ""


@dataclass(frozen=True)
class Finding:
    """The first sentence of a view: the result, with its numbers.

    Args:
        text: The sentence. Its tokens are already escaped with `written(…, token=True)`.
    """

    text: str


@dataclass(frozen=True)
class Paragraph:
    """One or more sentences.

    Args:
        text: The sentences.
        style: "" for the main text, "dim" for explanations, "bold" for a heading.
    """

    text: str
    style: str = ""


@dataclass(frozen=True)
class Running:
    """Running text, such as a prompt with colored tokens.

    Args:
        pieces: The pieces of the text, in order.
        spoken: Whether plain output includes it. False if a table has the same information, or if the text explains
            a drawing that plain output lacks.
    """

    pieces: tuple[Cell, ...]
    spoken: bool = True


@dataclass(frozen=True)
class Table:
    """A table, or a tree if it has `levels`.

    Args:
        columns: Column names. A name that begins with ">" marks a column of numbers.
        rows: The cells of each row.
        title: Title above the table.
        scroll: Maximum number of rows on a terminal, followed by the number of rows left out. 0: all rows.
        levels: The depth of each row in the tree, from 0. A terminal shows the tree instead of a table.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    scroll: int = 0
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError("a table row and the columns differ in length")
        if self.levels and len(self.levels) != len(self.rows):
            raise ValueError("the rows and the levels of a table differ in number")


@dataclass(frozen=True)
class Window:
    """The columns of a heat map that a narrow screen shows.

    Args:
        first: The first column. None: the last columns that fit.
        more: Command that shows other columns, with {} for the index of the first one.
    """

    first: int | None = None
    more: str = ""


@dataclass(frozen=True)
class Margin:
    """A text to the right of each row of a heat map, such as a rank.

    Args:
        title: Description of the texts.
        texts: The text of each row.
    """

    title: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """Fields of a heat map that may be folded.

    A terminal shows several rows of such fields as one line.

    Args:
        fields: Whether each field may be folded.
        note: Description of the folded rows.
    """

    fields: tuple[tuple[bool, ...], ...]
    note: str


@dataclass(frozen=True)
class Heatmap:
    """A heat map: one shade per value.

    Args:
        title: Title above the map.
        rows: Row labels, top to bottom.
        columns: Column labels.
        values: The values of each row. None: an empty field.
        scale: The color scale.
        tokens: Whether the column labels and `texts` are tokens.
        row_tokens: Whether the row labels are tokens.
        texts: Text in each field.
        hovers: Tooltip of each field on a web page. By default, tooltips are made from `says`.
        says: Template of the tooltips, with {row}, {column} and {value}.
        marked: Whether each field is highlighted. The last column with such a field is never cut off.
        window: The columns that a narrow screen shows.
        margin: The texts to the right of the rows.
        fold: The fields that may be folded.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    scale: Scale = field(default_factory=Scale)
    tokens: bool = True
    row_tokens: bool = False
    texts: tuple[tuple[str, ...], ...] | None = None
    hovers: tuple[tuple[str, ...], ...] | None = None
    says: str = "{row} · {column}: {value}"
    marked: tuple[tuple[bool, ...], ...] | None = None
    window: Window = Window()
    margin: Margin | None = None
    fold: Fold | None = None

    def __post_init__(self) -> None:
        grids: tuple[Sequence[Sequence[object]] | None, ...]
        grids = self.values, self.texts, self.hovers, self.marked, self.fold.fields if self.fold else None
        for grid in filter(None, grids):
            if len(grid) != len(self.rows) or any(len(row) != len(self.columns) for row in grid):
                raise ValueError("a heat map's fields and labels differ in number")
        if self.margin and len(self.margin.texts) != len(self.rows):
            raise ValueError("a heat map's rows and the texts beside them differ in number")

    def mark(self, row: int, column: int) -> bool:
        """Whether a field is highlighted.

        Args:
            row: Row of the field.
            column: Column of the field.
        """
        return self.marked is not None and self.marked[row][column]

    def row(self, index: int) -> str:
        """The label of a row, escaped for display."""
        return written(self.rows[index], token=self.row_tokens)

    def column(self, index: int) -> str:
        """The label of a column, escaped for display."""
        return written(self.columns[index], token=self.tokens)

    def text(self, row: int, column: int) -> str:
        """The text in a field, escaped for display; "" if the map has no texts.

        Args:
            row: Row of the field.
            column: Column of the field.
        """
        if self.texts is None:
            return ""
        return written(self.texts[row][column], token=self.tokens) if self.texts[row][column] else ""

    def hover(self, row: int, column: int) -> str:
        """The tooltip of a field; "" if it has neither a value nor a tooltip of its own.

        Args:
            row: Row of the field.
            column: Column of the field.
        """
        if self.hovers is not None:
            return written(self.hovers[row][column])
        value = self.values[row][column]
        if value is None:
            return ""
        text = self.text(row, column)
        names = {"row": self.row(row), "column": self.column(column)}
        names["value"] = f"{text}, {self.scale.figure(value)}" if text else self.scale.figure(value)
        return re.sub(r"{(row|column|value)}", lambda name: names[name[1]], written(self.says))

    def shade(self, row: int, column: int) -> tuple[str, float] | None:
        """The color of a field.

        Args:
            row: Row of the field.
            column: Column of the field.

        Returns:
            The name of a scale in `colors`, and the position on it, 0 to 1. None if the field is empty.
        """
        return self.scale.shade(self.values[row][column], self.texts[row][column] if self.texts else "")


@dataclass(frozen=True)
class Gallery:
    """A grid of small heat maps, each with its title.

    Args:
        title: Title above the grid.
        maps: The maps, row by row.
        columns: Number of maps per row, if that many fit. 0: as many as fit.
    """

    title: str
    maps: tuple[Heatmap, ...]
    columns: int = 0


@dataclass(frozen=True)
class Code:
    """An excerpt of source code.

    Args:
        text: The lines.
        path: The file they come from.
        first: Line number of the first line in that file.
        marked: Lines to highlight, counted from 1 within the excerpt.
        file: The whole text of that file, for correct syntax highlighting. If empty, `text` is lexed alone.
    """

    text: str
    path: str
    first: int
    marked: tuple[int, ...] = ()
    file: str = ""

    @property
    def line(self) -> int:
        """Number of the first marked line, or of the first line if none is marked."""
        return self.first + (self.marked[0] - 1 if self.marked else 0)

    @property
    def location(self) -> str:
        """The heading: the path and the line."""
        return f"{self.path}:{self.line}"

    @property
    def language(self) -> str:
        """The programming language, for syntax highlighting."""
        return "cpp" if self.path.endswith(".cpp") else "python"


PageBlock = Finding | Paragraph | Running | Table | Heatmap | Gallery | Code | Drawing


@dataclass(frozen=True)
class Page:
    """A whole view.

    Args:
        title: Title of the view.
        parts: The blocks, top to bottom.
        source: Names of the code that computed the view, as `/source` takes them.
    """

    title: str
    parts: tuple[PageBlock, ...]
    source: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The title, escaped, on one line and at most 160 characters long."""
        title = written(self.title).replace("\n", " ")
        return title if len(title) <= 160 else title[:159] + "…"

    @property
    def source_line(self) -> str:
        """A line with the commands that show the code that computed the view."""
        return "Source: " + ", ".join(f"/source {name}" for name in self.source)


# --- Shared by all renderers --------------------------------------------------------------------


def written(text: str, *, token: bool = False) -> str:
    """Escape invisible and control characters for display.

    Args:
        text: The text.
        token: Whether it is a token. If so, its white space is made visible too.
    """
    if token:
        return visible(text).plain
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char)[0] == "C" and char != "\n" else char
        for char in text
    )
