"""A view as values: a page of blocks. `to_terminal`, `to_plain`, `to_html` and `to_png` give it a form.

Styles are rich's, of the terminal's own 16 colors; nothing is said by them alone.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from llama_scratch.errors import UsageError
from llama_scratch.render.text import visible

_T = TypeVar("_T")


@dataclass(frozen=True)
class Cell:
    """What stands in a table, or a piece of a running text.

    token: the text is a token's, so what a screen would hide of it is made visible. bar: a bar of this length, 0 to 1,
    or −1 to 1 to both sides of a middle, behind the text. hover: what a web page says of it under the pointer.
    said: what plain lines say instead of a table's text and the name of its column.
    """

    text: str
    style: str = ""
    token: bool = False
    bar: float | None = None
    hover: str = ""
    said: str = ""


@dataclass(frozen=True)
class Paragraph:
    """A sentence or more. style: "" for what the view is about, "dim" for what explains it, "bold" for a heading."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Running:
    """Pieces one behind the other: a text whose tokens are colored.

    spoken: False where plain lines need none of it, because a table says the same, or it explains what they lack.
    """

    pieces: tuple[Cell, ...]
    spoken: bool = True


@dataclass(frozen=True)
class Table:
    """Rows under the names of columns, of which those that begin with ">" hold numbers.

    title: stands above it. scroll: rows shown on a terminal at most, 0 for all; the others are counted.
    levels: for each row how many rows it hangs below, each on the one before; a terminal shows a tree of them.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    scroll: int = 0
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError("a row of a table has another length than its columns")
        if self.levels and len(self.levels) != len(self.rows):
            raise ValueError("a table has another number of rows than of their levels")


@dataclass(frozen=True)
class Heatmap:
    """Numbers as shades, a row of them for each of `rows`, top to bottom.

    values: None where there is none. low, high: what the lightest and darkest shade stand for; where low is below 0
    the shades go to two sides of 0. columns: labels, of tokens where `tokens`. texts: what stands in each field, of
    tokens where `tokens`. hovers: what a web page says of each field; without it "row · column: value".
    first: the first column that a narrow screen shows, None for the last ones that fit. more: the command that shows
    others, with {} for the number of the first column. row_tokens: whether the labels of the rows are tokens too.
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

    def __post_init__(self) -> None:
        for grid in filter(None, (self.values, self.texts, self.hovers)):
            if len(grid) != len(self.rows) or any(len(row) != len(self.columns) for row in grid):
                raise ValueError("a heat map has other numbers of rows or columns than it has labels")

    @property
    def signed(self) -> bool:
        """Whether the shades go to two sides of 0."""
        return self.low < 0

    def row(self, index: int) -> str:
        """The label of a row as it is shown."""
        return written(self.rows[index], token=self.row_tokens)

    def column(self, index: int) -> str:
        """The label of a column as it is shown."""
        return written(self.columns[index], token=self.tokens)

    def text(self, row: int, column: int) -> str:
        """What is shown in a field; "" where there are no texts."""
        if self.texts is None:
            return ""
        return written(self.texts[row][column], token=self.tokens) if self.texts[row][column] else ""

    def hover(self, row: int, column: int) -> str:
        """What there is to say of a field; "" where it has no value and no words of its own."""
        if self.hovers is not None:
            return written(self.hovers[row][column])
        value = self.values[row][column]
        if value is None:
            return ""
        text = self.text(row, column)
        return f"{self.row(row)} · {self.column(column)}: {text + ', ' if text else ''}{figure(value)}"

    def level(self, row: int, column: int) -> float | None:
        """The shade of a field: 0 to 1, or −1 to 1 where it is signed; None where there is no value."""
        value = self.values[row][column]
        if value is None or math.isnan(value):
            return None
        if self.signed:
            reach = max(-self.low, self.high)
            return max(-1.0, min(1.0, value / reach))
        return max(0.0, min(1.0, (value - self.low) / ((self.high - self.low) or 1.0)))


@dataclass(frozen=True)
class Gallery:
    """Small heat maps beside each other, each with its title."""

    title: str
    maps: tuple[Heatmap, ...]


@dataclass(frozen=True)
class Code:
    """Lines of source, from the line `first` of the file `path` on; of these `marked` (from 1) stand out."""

    text: str
    path: str
    first: int
    marked: tuple[int, ...] = ()

    @property
    def language(self) -> str:
        """For the colors."""
        return "cpp" if self.path.endswith(".cpp") else "python"


PageBlock = Paragraph | Running | Table | Heatmap | Gallery | Code


@dataclass(frozen=True)
class Page:
    """A whole view. source: the names of what computed it, as /source takes them."""

    title: str
    parts: tuple[PageBlock, ...]
    source: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The title as it is shown: on one line, and no longer than a reader takes for one."""
        title = written(self.title).replace("\n", " ")
        return title if len(title) <= 160 else title[:159] + "…"

    @property
    def source_line(self) -> str:
        """The commands that show the code behind the view."""
        return "Source: " + ", ".join(f"/source {name}" for name in self.source)


def joined(title: str, pages: tuple[Page, ...]) -> Page:
    """One page of several, each under its title."""
    if not pages:
        raise UsageError("There is nothing to show yet, expected a view before it.")
    parts = [part for page in pages for part in (Paragraph(page.title, "bold"), *page.parts)]
    return Page(title, tuple(parts), tuple(dict.fromkeys(name for page in pages for name in page.source)))


# --- What every form of a page needs ------------------------------------------------------------


def written(text: str, *, token: bool = False) -> str:
    """A text with nothing in it that a screen would hide or obey; a token's white space is visible too."""
    if token:
        return visible(text).plain
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char)[0] == "C" and char != "\n" else char
        for char in text
    )


def figure(value: float) -> str:
    """A number as a person reads it: three digits that say something."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def pooled(heatmap: Heatmap, rows: int, columns: int) -> Heatmap:
    """A heat map in at most so many fields: of each block the one that is farthest from 0, under the first's label."""
    if len(heatmap.rows) <= rows and len(heatmap.columns) <= columns:
        return heatmap
    down, across = _blocks(len(heatmap.rows), rows), _blocks(len(heatmap.columns), columns)

    def strength(place: tuple[int, int]) -> float:
        value = heatmap.values[place[0]][place[1]]
        return -1.0 if value is None or math.isnan(value) else abs(value)

    fields = [[max(((r, c) for r in high for c in wide), key=strength) for wide in across] for high in down]

    def kept(grid: Sequence[Sequence[_T]]) -> tuple[tuple[_T, ...], ...]:
        return tuple(tuple(grid[r][c] for r, c in row) for row in fields)

    return replace(
        heatmap,
        rows=tuple(heatmap.rows[high[0]] for high in down),
        columns=tuple(heatmap.columns[wide[0]] for wide in across),
        values=kept(heatmap.values),
        texts=heatmap.texts and kept(heatmap.texts),
        hovers=heatmap.hovers and kept(heatmap.hovers),
        first=None,
        more="",
    )


def _blocks(length: int, max_blocks: int) -> list[range]:
    """0 to length in at most so many pieces of nearly the same length."""
    count = min(length, max_blocks)
    return [range(i * length // count, (i + 1) * length // count) for i in range(count)]


def pooling(whole: Heatmap, shown: Heatmap) -> str:
    """A sentence that says what `pooled` did; "" where it did nothing."""
    high, wide = (
        math.ceil(len(a) / len(b)) if b else 1 for a, b in ((whole.rows, shown.rows), (whole.columns, shown.columns))
    )
    if len(whole.rows) == len(shown.rows) and len(whole.columns) == len(shown.columns):
        return ""
    size = f"{len(whole.rows):,} × {len(whole.columns):,}"
    return f"Of {size} values the strongest of each {high} × {wide} or so is shown."
