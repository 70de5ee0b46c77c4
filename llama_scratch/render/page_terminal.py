"""Pages on a terminal, and as plain lines."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from llama_scratch.render.page import Code, Gallery, Heatmap, Page, Paragraph, Part, Running, Table
from llama_scratch.render.terminal import visible


def view(page: Page) -> RenderableType:
    """The page, as wide as the terminal."""
    return Group(*(Padding(part, (1, 0, 0, 1)) for part in map(_shown, page.parts)), Text())


def plain(page: Page) -> Text:
    """The page as lines that a screen reader reads well."""
    return Text("\n".join(line for part in page.parts for line in _lines(part)))


def _shown(part: Part) -> RenderableType:
    return Text("\n".join(_lines(part)))


def _lines(part: Part) -> Iterator[str]:
    match part:
        case Paragraph():
            yield part.text
        case Running():
            yield "".join(visible(piece.text).plain for piece in part.pieces)
        case Table():
            for row in part.rows:
                yield ", ".join(cell.text for cell in row)
        case Heatmap():
            yield part.title
        case Gallery():
            for heatmap in part.maps:
                yield heatmap.title
        case Code():
            yield part.text
