"""Angles as a row of clock hands, one row per position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from llama_scratch.render.drawings.drawing import NARROW, Disc, Drawing, Label, Picture, Shape, Stroke, step

# Eight directions, counterclockwise from the right.
_ARROWS, _ARROWS_ASCII = "→↗↑↖←↙↓↘", ">/^\\</v\\"
# Columns of a dial on a terminal: an arrow, degrees and a gap.
_DIAL = 5
_PER_ROW, _PER_ROW_NARROW = 32, 11


@dataclass(frozen=True)
class Dials(Drawing):
    """Angles that depend on a position, each drawn as the hand of a dial.

    An angle of 0 points to the right, and angles increase counterclockwise.

    Attributes:
        positions: The positions, one row each.
        angles: The angles of each position, in radians.
        unit: Name of a dial, such as "pair".
    """

    positions: tuple[int, ...]
    angles: tuple[tuple[float, ...], ...]
    unit: str

    def picture(self, width: int) -> Picture:
        """Return the shapes. Rows that are too long continue below."""
        side = width / (_PER_ROW_NARROW if width == NARROW else _PER_ROW)
        shapes: list[Shape] = []
        y = 0.0
        for group in self._groups(int(width / side)):
            for c, pair in enumerate(group):
                shapes.append(Label((c + 0.5) * side, y + 8, str(pair), 11, "soft", centered=True))
            y += 18
            for position, angles in zip(self.positions, self.angles, strict=True):
                shapes.append(Label(0, y + 10, f"position {position:,}", 12, bold=True))
                y += 20
                for c, pair in enumerate(group):
                    hover = f"{self.unit} {pair} at position {position:,}: {degrees(angles[pair])}°"
                    shapes.extend(_hand((c + 0.5) * side, y + side / 2, side / 2 - 2, angles[pair], hover))
                y += side + 6
            y += 8
        return Picture(width, max(1.0, y - 8), tuple(shapes))

    def lines(self, width: int, *, blocks: bool) -> Iterator[Text]:
        """Yield one line per position, with an arrow and the degrees of each dial.

        Long lines continue below.

        Args:
            width: Number of columns.
            blocks: Whether the terminal has Unicode characters.
        """
        names = [f"{position:,}" for position in self.positions]
        label = max(map(len, [self.unit, *names])) + 2
        for n, group in enumerate(self._groups(max(1, (width - label) // _DIAL))):
            if n:
                yield Text()
            head = "".join(f"{pair:<{_DIAL}}" for pair in group)
            yield Text((self.unit.ljust(label) + head).rstrip(), style="dim", no_wrap=True, overflow="crop")
            for name, angles in zip(names, self.angles, strict=True):
                line = Text(name.ljust(label), no_wrap=True, overflow="crop")
                for pair in group:
                    line.append(arrow(angles[pair], blocks=blocks), "bold cyan")
                    line.append(f"{degrees(angles[pair])}".ljust(_DIAL - 1))
                line.rstrip()
                yield line

    def spoken(self) -> Iterator[str]:
        """Yield one line per position."""
        for position, angles in zip(self.positions, self.angles, strict=True):
            hands = ", ".join(f"{pair} {degrees(angle)}°" for pair, angle in enumerate(angles))
            yield f"Position {position:,}, angle of each {self.unit}: {hands}"

    def _groups(self, size: int) -> Iterator[Sequence[int]]:
        count = len(self.angles[0]) if self.angles else 0
        for first in range(0, count, size):
            yield range(first, min(first + size, count))


def degrees(angle: float) -> int:
    """Round an angle to degrees, 0 to 359."""
    return round(math.degrees(angle)) % 360


def arrow(angle: float, *, blocks: bool = True) -> str:
    """The nearest of eight arrows to an angle.

    Args:
        angle: The angle in radians.
        blocks: Whether the terminal has Unicode characters.
    """
    return (_ARROWS if blocks else _ARROWS_ASCII)[round(degrees(angle) / 45) % 8]


def _hand(x: float, y: float, radius: float, angle: float, hover: str) -> Iterator[Shape]:
    """Yield the shapes of a dial: its face, and its hand from the center."""
    yield Disc(x, y, radius, "panel", "line", hover)
    yield Stroke(x, y, x + 0.86 * radius * math.cos(angle), y - 0.86 * radius * math.sin(angle), step(0.7), 2.4)
