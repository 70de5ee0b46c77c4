"""A network, drawn as a line for its residual stream with blocks that add to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from llama_scratch.render.drawings.drawing import (
    NARROW,
    Box,
    Disc,
    Drawing,
    Label,
    Picture,
    Shape,
    Stroke,
    cut,
    step,
)

# Height of a part and of the gap between parts; x of the stream and left edge of the branches.
_HIGH, _GAP, _STREAM, _BRANCH = 44, 16, 40, 96
_MAX_COLUMNS = 76


@dataclass(frozen=True)
class Part:
    """One part of the network.

    Attributes:
        name: Its label, such as "9 query heads × 64".
        detail: Its weight and shape, or "".
        strength: Its share of the parameters, which shades its box.
    """

    name: str
    detail: str = ""
    strength: float = 0.0


PartRow = tuple[Part, ...]


@dataclass(frozen=True)
class Diagram(Drawing):
    """A network from the first part at the top to the last one at the bottom.

    Attributes:
        stream: Name of the line from top to bottom.
        before: Parts on the line before the layers.
        layers: Name of the repeated part, such as "30 layers".
        branches: Blocks of a layer. The parts of each row of a block are computed in parallel. The result of the block
            is added to the line.
        after: Parts on the line after the layers.
    """

    stream: str
    before: tuple[Part, ...]
    layers: str
    branches: tuple[tuple[PartRow, ...], ...]
    after: tuple[Part, ...]

    def picture(self, width: int) -> Picture:
        """Return the shapes: the line from top to bottom, and boxes for the parts."""
        lower: list[Shape] = []  # below the line
        upper: list[Shape] = []
        y = _stack(self.before, 0.0, width, upper)
        upper.append(Label(_STREAM + 14, y + 4, self.stream, 13, "ink", bold=True))
        y += 26
        top = y
        upper.append(Label(_STREAM + 14, y + 18, self.layers, 14, "ink", bold=True))
        upper.append(Label(_BRANCH + 60, y + 18, "shade: share of the parameters", 11.5, "soft"))
        y += 34
        for branch in self.branches:
            y = _branch(branch, y, width, upper)
        lower.append(Box(1, top, width - 2, y - top, "panel", "line"))
        end = _stack(self.after, y + _GAP, width, upper)
        line = Stroke(_STREAM, _HIGH / 2, _STREAM, end - _HIGH / 2, step(0.55), 4)
        return Picture(width, end - _GAP + 2, (*lower, line, *upper))

    def lines(self, width: int, *, blocks: bool) -> Iterator[Text]:
        """Yield the line with the branches to its right, in box-drawing characters.

        Args:
            width: Number of columns.
            blocks: Whether the terminal has Unicode characters.
        """
        width = min(width, _MAX_COLUMNS)
        for text, style in self._drawn(width):
            drawn = text if blocks else text.translate(_ASCII)
            yield Text(drawn.rstrip(), style=style, no_wrap=True, overflow="crop")

    def _drawn(self, width: int) -> Iterator[tuple[str, str]]:
        yield from _framed([self.before], width, " ", " ")
        yield " ┃", "bold"
        yield f" ┃ {cut(self.stream, width - 3)}", "bold"
        frame = f"─┃─ {self.layers} "
        yield frame + "─" * max(0, width - cell_len(frame)), ""
        for branch in self.branches:
            yield " ┃", "bold"
            yield from _framed(branch, width, " ┣━▶ ", " ⊕◀━ ")
        yield " ┃", "bold"
        yield "─┃" + "─" * (width - 2), ""
        yield " ┃", "bold"
        yield from _framed([self.after], width, " ", " ")

    def spoken(self) -> Iterator[str]:
        """Yield one line per part, in order of execution."""
        yield from map(_said, self.before)
        yield f"{self.stream}; then {self.layers}, each:"
        for branch in self.branches:
            yield from (_said(part) for row in branch for part in row)
            yield "The result is added to the stream."
        yield from map(_said, self.after)


_ASCII = str.maketrans("┃┣━▶⊕◀─│┌┐└┘×·√→", "|+->+<-|++++x*v>")


def _said(part: Part) -> str:
    return f"{part.name}: {part.detail}" if part.detail else part.name


# --- Terminal ---------------------------------------------------------------------------------


def _framed(rows: Sequence[PartRow], width: int, first: str, last: str) -> Iterator[tuple[str, str]]:
    """Yield a frame around parts, with an arrow to the first and from the last part."""
    side = " ┃".ljust(len(first)) if len(first) > 1 else first
    room = width - len(first) - 4
    inner = [line for row in rows for part in row for line in _inner(part, room)]
    yield f"{side}┌{'─' * (room + 2)}┐", ""
    for n, line in enumerate(inner):
        lead = last if n == len(inner) - 1 else first if n == 0 else side
        yield f"{lead}│ {line}{' ' * (room - cell_len(line))} │", ""
    yield f"{side}└{'─' * (room + 2)}┘", ""


def _inner(part: Part, room: int) -> Iterator[str]:
    """Yield the line of a part, or two lines if it is too long."""
    gap = room - cell_len(part.name) - cell_len(part.detail)
    if gap >= 2 or not part.detail:
        yield cut(part.name + " " * gap + part.detail, room)
    else:
        yield cut(part.name, room)
        detail = cut(part.detail, room)
        yield " " * (room - cell_len(detail)) + detail


# --- Shapes -----------------------------------------------------------------------------------


def _stack(parts: tuple[Part, ...], y: float, width: int, shapes: list[Shape]) -> float:
    """Add boxes on the line. Returns the top edge for the next shape."""
    for part in parts:
        shapes.extend(_box(part, 1, y, min(width - 2, 460)))
        y += _HIGH + _GAP
    return y


def _branch(rows: tuple[PartRow, ...], y: float, width: int, shapes: list[Shape]) -> float:
    """Add a block that branches off the line, and the point where it is added back.

    Returns the top edge for the next shape.
    """
    left, right = _BRANCH, width - 16
    center = (left + right) / 2
    shapes.append(Stroke(_STREAM, y + _HIGH / 2, left - 2, y + _HIGH / 2, "soft", 1.6, arrow=True))
    stacked = [(part,) for row in rows for part in row] if width == NARROW else rows
    for n, row in enumerate(stacked):
        gap = 10.0
        wide = (right - left - gap * (len(row) - 1)) / len(row)
        for c, part in enumerate(row):
            x = left + c * (wide + gap)
            shapes.extend(_box(part, x, y, wide))
            if n and width != NARROW:
                middle = x + wide / 2 if len(row) > 1 or len(stacked[n - 1]) == 1 else center
                shapes.append(Stroke(middle, y - _GAP + 1, middle, y - 2, "soft", 1.6, arrow=True))
        y += _HIGH + _GAP
    foot = y - _GAP - _HIGH / 2
    shapes.append(Stroke(left, foot, _STREAM + 12, foot, "soft", 1.6, arrow=True))
    shapes.append(Disc(_STREAM, foot, 11, "paper", "ink"))
    shapes.append(Label(_STREAM, foot, "+", 16, bold=True, centered=True))
    return y + 8


def _box(part: Part, x: float, y: float, wide: float) -> Iterator[Shape]:
    fill = step(0.62 * part.strength)
    ink = f"on-{fill}"
    middle = x + wide / 2
    yield Box(x, y, wide, _HIGH, fill, "soft", _said(part))
    yield Label(middle, y + (15 if part.detail else _HIGH / 2), part.name, 13, ink, bold=True, centered=True)
    if part.detail:
        yield Label(middle, y + 31, part.detail, 11.5, ink, mono=True, centered=True)
