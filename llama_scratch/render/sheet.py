"""The drawing surface of a picture, on top of matplotlib. Lengths are in inches."""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING

from llama_scratch.render import colors
from llama_scratch.render.letters import drawable, font
from llama_scratch.render.page import Heatmap
from llama_scratch.render.palette import LIGHT_PALETTE

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure

WIDTH = 10.0
PAPER, INK, SOFT, _BAR, _LESS = (LIGHT_PALETTE[name] for name in ("paper", "ink", "soft", "bar", "less"))


class Sheet:
    """A drawing surface. Positions are inches from the left and from the top.

    Args:
        figure: The figure of matplotlib.
        height: Height of the figure.
    """

    def __init__(self, figure: Figure, height: float):
        self.figure, self.height = figure, height

    def write(
        self, x: float, y: float, text: str, size: float, *, color: str = INK, mono: bool = False,
        bold: bool = False, right: bool = False, upright: bool = False, centered: bool = False,
    ) -> None:  # fmt: skip
        """Draw a line of text.

        Args:
            x: Left edge. If `right`: right edge. If `upright`: center.
            y: Vertical center. If `upright`: bottom, and the text runs upwards.
            text: The text.
            size: Font size in points.
            color: Text color.
            mono: Whether the font is monospaced.
            bold: Whether the font is bold.
            right: Whether the text ends at x.
            upright: Whether the text is rotated by 90°.
            centered: Whether x is the center.
        """
        self.figure.text(
            x / WIDTH, 1 - y / self.height, drawable(text, mono, bold), fontsize=size, color=color,
            fontproperties=font(mono, bold, size), rotation=90 if upright else 0, parse_math=False,
            ha="center" if upright or centered else "right" if right else "left",
            va="bottom" if upright else "center_baseline",
        )  # fmt: skip

    def fill(self, x: float, y: float, wide: float, high: float, color: str, *, hatch: bool = False) -> None:
        """Fill a rectangle.

        Args:
            x: Left edge.
            y: Top edge.
            wide: Width.
            high: Height.
            color: Fill color.
            hatch: Whether to add diagonal stripes.
        """
        from matplotlib.patches import Rectangle

        place = (x / WIDTH, 1 - (y + high) / self.height)
        box = Rectangle(
            place, wide / WIDTH, high / self.height, facecolor=color, edgecolor=PAPER, linewidth=0,
            hatch="////" if hatch else None, transform=self.figure.transFigure,
        )  # fmt: skip
        self.figure.add_artist(box)

    def bar(self, x: float, y: float, size: tuple[float, float], value: float, *, both: bool) -> None:
        """Draw a bar. Negative values are hatched.

        Args:
            x: Left edge of the space for the bar.
            y: Top edge.
            size: Width and height of the space.
            value: The length as a share of the width, from −1 to 1.
            both: Whether the bar begins at a center line.
        """
        wide, high = size
        middle = x + wide / 2 if both else x
        length = abs(value) * (wide / 2 if both else wide)
        color = _LESS if value < 0 else _BAR
        begin = middle - length if value < 0 else middle
        self.fill(begin, y + 0.28 * high, max(length, 0.01), 0.48 * high, color, hatch=value < 0)
        if both:
            self.fill(middle, y + 0.1 * high, 0.01, 0.8 * high, SOFT)

    def right_edge(self) -> float:
        """The right edge of the rightmost pixel that is not background."""
        import numpy as np

        data = io.BytesIO()
        self.figure.savefig(data, format="rgba", facecolor=PAPER)
        pixels = np.frombuffer(data.getvalue(), np.uint8).reshape(-1, round(WIDTH * self.figure.dpi), 4)
        columns = (pixels != pixels[0, 0]).any(axis=(0, 2)).nonzero()[0]
        return float((columns[-1] + 1) / self.figure.dpi) if len(columns) else 0.0

    def shades(self, x: float, y: float, size: tuple[float, float], heatmap: Heatmap, columns: range) -> None:
        """Draw the shades of a heat map.

        Args:
            x: Left edge.
            y: Top edge.
            size: Width and height of a field.
            heatmap: The heat map.
            columns: The columns to draw.
        """
        rows = range(len(heatmap.rows))
        wide, high = size[0] * len(columns), size[1] * len(rows)
        if not rows or not columns:
            return
        axes = self.figure.add_axes((x / WIDTH, 1 - (y + high) / self.height, wide / WIDTH, high / self.height))
        axes.axis("off")
        shades = [[_rgba(shade_of(heatmap, r, c)) for c in columns] for r in rows]
        axes.imshow(shades, aspect="auto", interpolation="nearest", extent=(0, len(columns), len(rows), 0))
        if min(size) > 0.1:  # a thin line between fields
            axes.vlines(range(len(columns) + 1), 0, len(rows), colors=PAPER, linewidth=0.8)
            axes.hlines(range(len(rows) + 1), 0, len(columns), colors=PAPER, linewidth=0.8)


def shade_of(heatmap: Heatmap, row: int, column: int) -> str | None:
    """The color of a field.

    Args:
        heatmap: The heat map.
        row: Row of the field.
        column: Column of the field.

    Returns:
        A hex color, or None if the field is empty.
    """
    shade = heatmap.shade(row, column)
    if shade is None:
        return None
    if heatmap.mark(row, column):
        return colors.MARK["light"]
    scale, strength = shade
    return scale_of(scale)[colors.step(strength)]


@cache
def scale_of(name: str) -> list[str]:
    """The colors of a scale of `colors`, for a light background."""
    return colors.steps(colors.LIGHT[name])


def _rgba(color: str | None) -> tuple[int, int, int, int]:
    if color is None:
        return 0, 0, 0, 0
    red, green, blue = bytes.fromhex(color[1:])
    return red, green, blue, 255
