"""The data model of a view: a page made of blocks.

`to_terminal`, `to_plain`, `to_html` and `to_png` render it. Styles are rich's style names, limited to the terminal's 16
colors, and the named styles of `surprise`, which each renderer maps to its own colors. Color never carries information
on its own.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from llama_scratch.render.drawings.drawing import Drawing
from llama_scratch.render.text import percent, visible


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
    """The sentence that a view begins with: what was found, with the measured numbers.

    Args:
        text: The sentence. Tokens in it are written by `written(…, token=True)`.
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
        scroll: Maximum number of rows on a terminal, which then says how many more there are. 0: all rows.
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
class Kind:
    """A kind of field in a heat map, with a color scale of its own.

    Args:
        letter: The text of its fields.
        name: Its name in the legend.
        hue: The name of its scale in `colors`: "gray", "blue", "amber" or "pink".
    """

    letter: str
    name: str
    hue: str


@dataclass(frozen=True)
class Heatmap:
    """A heat map: one shade per value.

    Args:
        title: Title above the map.
        rows: Row labels, top to bottom.
        columns: Column labels.
        values: The values of each row. None: the field is empty.
        low: The value of the lightest shade. If it is negative, the color scale diverges from 0.
        high: The value of the darkest shade.
        tokens: Whether the column labels and `texts` are tokens.
        texts: Text in each field.
        hovers: Tooltip of each field on a web page. Default: `says`.
        first: First column on a narrow screen. None: the last columns that fit.
        more: Command that shows other columns, with {} for the index of the first one.
        row_tokens: Whether the row labels are tokens.
        legend: What the values are, such as "probability of the top prediction".
        percent: Whether the values are shares, shown as percentages.
        end_labels: The ends of the legend, if not the values `low` and `high`.
        says: Tooltip of a field, with {row}, {column} and {value}.
        beside: A text to the right of each row, such as a rank.
        beside_title: What the texts in `beside` are.
        marked: Whether each field is highlighted. The last column with such a field is never cut off.
        quiet: Whether each field may be folded. A terminal shows several rows of quiet fields as one line.
        fold: What is common to the rows that are folded.
        kinds: The kinds of fields. The hue of a field is that of the kind whose letter is its text, by default gray.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    low: float = 0.0
    high: float = 1.0
    tokens: bool = True
    texts: tuple[tuple[str, ...], ...] | None = None
    hovers: tuple[tuple[str, ...], ...] | None = None
    first: int | None = None
    more: str = ""
    row_tokens: bool = False
    legend: str = ""
    percent: bool = False
    end_labels: tuple[str, str] | None = None
    says: str = "{row} · {column}: {value}"
    beside: tuple[str, ...] = ()
    beside_title: str = ""
    marked: tuple[tuple[bool, ...], ...] | None = None
    quiet: tuple[tuple[bool, ...], ...] | None = None
    fold: str = ""
    kinds: tuple[Kind, ...] = ()

    def __post_init__(self) -> None:
        grids: tuple[Sequence[Sequence[object]] | None, ...]
        grids = self.values, self.texts, self.hovers, self.marked, self.quiet
        for grid in filter(None, grids):
            if len(grid) != len(self.rows) or any(len(row) != len(self.columns) for row in grid):
                raise ValueError("a heat map's fields and labels differ in number")
        if self.beside and len(self.beside) != len(self.rows):
            raise ValueError("a heat map's rows and the texts beside them differ in number")

    @property
    def signed(self) -> bool:
        """Whether the color scale diverges from 0."""
        return self.low < 0

    @property
    def ends(self) -> tuple[float, float]:
        """The values at both ends of the legend. A diverging map whose values have one sign shows that half only."""
        if not self.signed:
            return self.low, self.high
        reach = max(-self.low, self.high)
        values = [value for row in self.values for value in row if value is not None and not math.isnan(value)]
        if all(value >= 0 for value in values):
            return 0.0, reach
        return -reach, (reach if any(value > 0 for value in values) else 0.0)

    @property
    def labels(self) -> tuple[str, str]:
        """The labels of `ends`."""
        low, high = self.ends
        if self.percent:
            return f"{100 * low:g}", f"{100 * high:g} %"
        return self.end_labels or (figure(low), figure(high))

    def figure(self, value: float) -> str:
        """Format a value of the map."""
        return percent(value) if self.percent else figure(value)

    def mark(self, row: int, column: int) -> bool:
        """Whether a field is highlighted."""
        return self.marked is not None and self.marked[row][column]

    def row(self, index: int) -> str:
        """The label of a row, escaped for display."""
        return written(self.rows[index], token=self.row_tokens)

    def column(self, index: int) -> str:
        """The label of a column, escaped for display."""
        return written(self.columns[index], token=self.tokens)

    def text(self, row: int, column: int) -> str:
        """The text in a field, escaped for display; "" if the map has no texts."""
        if self.texts is None:
            return ""
        return written(self.texts[row][column], token=self.tokens) if self.texts[row][column] else ""

    def hover(self, row: int, column: int) -> str:
        """The tooltip of a field; "" if it has neither a value nor a tooltip of its own."""
        if self.hovers is not None:
            return written(self.hovers[row][column])
        value = self.values[row][column]
        if value is None:
            return ""
        text = self.text(row, column)
        names = {"row": self.row(row), "column": self.column(column)}
        names["value"] = f"{text}, {self.figure(value)}" if text else self.figure(value)
        return re.sub(r"{(row|column|value)}", lambda name: names[name[1]], written(self.says))

    def shade(self, row: int, column: int) -> tuple[str, float] | None:
        """The name of a field's scale in `colors` and the place on it, 0 to 1. None: empty."""
        level = self.level(row, column)
        if level is None:
            return None
        if self.kinds:
            hues = {kind.letter: kind.hue for kind in self.kinds}
            return hues.get(self.texts[row][column] if self.texts else "", "gray"), abs(level)
        return ("m" if level < 0 else "p") if self.signed else "v", abs(level)

    def level(self, row: int, column: int) -> float | None:
        """The shade of a field, 0 to 1, or −1 to 1 if the map is signed. None: empty."""
        value = self.values[row][column]
        if value is None or math.isnan(value):
            return None
        if self.signed:
            reach = max(-self.low, self.high)
            return max(-1.0, min(1.0, value / reach))
        return max(0.0, min(1.0, (value - self.low) / ((self.high - self.low) or 1.0)))


@dataclass(frozen=True)
class Gallery:
    """A grid of small heat maps, each with its title.

    Args:
        title: Title above the grid.
        maps: The maps, row by row.
        columns: Number of maps per row if there is room for so many. 0: as many as fit.
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
        file: The whole text of that file, to color the excerpt as in its file. If empty, `text` is lexed alone.
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
        """The commands that show the code that computed the view."""
        return "Source: " + ", ".join(f"/source {name}" for name in self.source)


# --- Shared by all renderers --------------------------------------------------------------------


def written(text: str, *, token: bool = False) -> str:
    """Escape invisible and control characters for display.

    Args:
        text: The text.
        token: Whether it is a token, whose white space becomes visible too.
    """
    if token:
        return visible(text).plain
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char)[0] == "C" and char != "\n" else char
        for char in text
    )


def figure(value: float) -> str:
    """Format a number: 3 significant digits, or an integer with commas from 1,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
