"""A view as values: a page of parts, which `page_terminal` prints, `html` writes as a web page and `png` draws.

Styles are rich's, of the terminal's own 16 colours; nothing is said by them alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_scratch.errors import UsageError


@dataclass(frozen=True)
class Cell:
    """What stands in a table, or a piece of a running text.

    token: the text is a token's, so what a screen would hide of it is made visible. bar: a bar of this length, 0 to 1,
    or −1 to 1 to both sides of a middle, behind the text. hover: what a web page says of it under the pointer.
    """

    text: str
    style: str = ""
    token: bool = False
    bar: float | None = None
    hover: str = ""


@dataclass(frozen=True)
class Paragraph:
    """A sentence or more. style: "" for what the view is about, "dim" for what explains it, "bold" for a heading."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Running:
    """Pieces one behind the other: a text whose tokens are coloured."""

    pieces: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Rows under the names of columns, of which those that begin with ">" hold numbers.

    title: stands above it. scroll: rows shown on a terminal at most, 0 for all; the others are counted.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    scroll: int = 0

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError("a row of a table has another length than its columns")


@dataclass(frozen=True)
class Heatmap:
    """Numbers as shades, a row of them for each of `rows`, top to bottom.

    values: None where there is none. low, high: what the lightest and darkest shade stand for; where low is below 0
    the shades go to two sides of 0. columns: labels, of tokens where `tokens`. texts: what stands in each field, of
    tokens where `tokens`. hovers: what a web page says of each field; without it "row · column: value".
    first: the first column that a narrow screen shows, None for the last ones that fit. more: the command that shows
    others, with {} for the number of the first column.
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

    def __post_init__(self) -> None:
        for grid in filter(None, (self.values, self.texts, self.hovers)):
            if len(grid) != len(self.rows) or any(len(row) != len(self.columns) for row in grid):
                raise ValueError("a heat map has other numbers of rows or columns than it has labels")


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


Part = Paragraph | Running | Table | Heatmap | Gallery | Code


@dataclass(frozen=True)
class Page:
    """A whole view. source: the names of what computed it, as /source takes them."""

    title: str
    parts: tuple[Part, ...]
    source: tuple[str, ...] = ()


def joined(title: str, pages: tuple[Page, ...]) -> Page:
    """One page of several, each under its title."""
    if not pages:
        raise UsageError("There is nothing to show yet, expected a view before it.")
    parts = [part for page in pages for part in (Paragraph(page.title, "bold"), *page.parts)]
    return Page(title, tuple(parts), tuple(dict.fromkeys(name for page in pages for name in page.source)))
