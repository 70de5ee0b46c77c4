"""The base class of drawings, and the shapes they are made of.

Lengths are pixels of a page. Colors are names: "ink", "soft", "line", "panel" and "paper", a step "v0" to "v24" of the
sequential scale of `colors`, or "on-v0" to "on-v24" for a text on that step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from llama_scratch.render import colors

# Widths of a picture on a screen or a sheet, and on a phone.
WIDE, NARROW = 960, 350
# Width of a monospaced character relative to the font size.
_LETTER = 0.605


@dataclass(frozen=True)
class Box:
    """A rectangle with an outline. `hover` is its tooltip on a web page."""

    x: float
    y: float
    wide: float
    high: float
    fill: str
    edge: str = "paper"
    hover: str = ""


@dataclass(frozen=True)
class Disc:
    """A circle around (x, y). `hover` is its tooltip on a web page."""

    x: float
    y: float
    radius: float
    fill: str
    edge: str = "soft"
    hover: str = ""


@dataclass(frozen=True)
class Stroke:
    """A straight line, with an arrowhead at its end if `arrow`."""

    x: float
    y: float
    to_x: float
    to_y: float
    color: str = "ink"
    thickness: float = 1.0
    arrow: bool = False


@dataclass(frozen=True)
class Label:
    """A line of text.

    `y` is its vertical center. `x` is its left edge, or its horizontal center if `centered`.
    """

    x: float
    y: float
    text: str
    size: float = 13.0
    color: str = "ink"
    mono: bool = False
    bold: bool = False
    centered: bool = False


Shape = Box | Disc | Stroke | Label


@dataclass(frozen=True)
class Picture:
    """Shapes on an area of the given size, in painting order."""

    wide: float
    high: float
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Drawing(ABC):
    """A block of a page that is drawn.

    Attributes:
        title: Title above the drawing. It also names the drawing for screen readers.
    """

    title: str

    @abstractmethod
    def picture(self, width: int) -> Picture:
        """Return the shapes for a web page or a PNG file.

        Args:
            width: The width, `WIDE` or `NARROW`.
        """

    @abstractmethod
    def lines(self, width: int, *, blocks: bool) -> Iterator[Text]:
        """Yield the lines for a terminal.

        Args:
            width: Number of columns.
            blocks: Whether the terminal has Unicode characters.
        """

    @abstractmethod
    def spoken(self) -> Iterator[str]:
        """Yield the lines for plain output."""


def step(level: float) -> str:
    """The color of a level from 0 to 1."""
    return f"v{colors.step(level)}"


def cut(text: str, width: int) -> str:
    """Cut a text that is too long. A cut text ends with an ellipsis.

    Args:
        text: The text.
        width: Maximum number of columns.
    """
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1) + "…" if width > 0 else ""


def letters(room: float, size: float) -> int:
    """The number of monospaced characters that fit into a width.

    Args:
        room: The width in pixels.
        size: Font size in pixels.
    """
    return max(0, int(room / (_LETTER * size)))
