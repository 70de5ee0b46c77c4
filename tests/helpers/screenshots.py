"""Draw the lines of a terminal as a picture.

A line is a list of rich's segments, from a view or from the screen of `Terminal`. Colors come from one of two themes,
dim text is mixed with its background, and block elements and box-drawing characters are drawn as exact shapes, as
terminals draw them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from rich.cells import cell_len
from rich.color import Color, blend_rgb
from rich.color_triplet import ColorTriplet
from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import TerminalTheme

# matplotlib's fonts are the same on every machine.
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
# The share of the background in dim text.
DIM = 0.4

Line = Sequence[Segment]


def _theme(background: str, foreground: str, normal: str, bright: str) -> TerminalTheme:
    def colors(text: str) -> list[tuple[int, int, int]]:
        return [ColorTriplet(*bytes.fromhex(color)) for color in text.split()]

    return TerminalTheme(colors(background)[0], colors(foreground)[0], colors(normal), colors(bright))


# Black, red, green, yellow, blue, magenta, cyan, white.
THEMES = {
    # Catppuccin Mocha
    "dark": _theme(
        "1e1e2e",
        "cdd6f4",
        "45475a f38ba8 a6e3a1 f9e2af 89b4fa f5c2e7 94e2d5 bac2de",
        "7f849c f38ba8 a6e3a1 f9e2af 89b4fa f5c2e7 94e2d5 a6adc8",
    ),
    # GitHub Light
    "light": _theme(
        "ffffff",
        "24292f",
        "24292f cf222e 116329 4d2d00 0969da 8250df 1b7c83 6e7781",
        "57606a a40e26 1a7f37 633c01 218bff a475f9 3192aa 8c959f",
    ),
}
# How terminals tell programs that they have 24-bit color, and the numbers of their text and background colors.
ENVIRONMENTS = {
    "dark": {"COLORTERM": "truecolor", "COLORFGBG": "15;0"},
    "light": {"COLORTERM": "truecolor", "COLORFGBG": "0;15"},
}


def view_lines(view: RenderableType, columns: int, theme: str = "dark", *, color: bool = True) -> list[list[Segment]]:
    """Render a view as a terminal with 24-bit color shows it.

    Args:
        view: The view.
        columns: Width of the terminal.
        theme: "dark" or "light".
        color: False for a terminal with NO_COLOR.

    Returns:
        The lines, which are not cut at the width of the terminal.
    """
    console = Console(
        file=io.StringIO(), width=columns, height=50, force_terminal=True, color_system="truecolor",
        no_color=not color, legacy_windows=False, emoji=False,
    )  # fmt: skip
    with patch.dict(os.environ, ENVIRONMENTS[theme]):
        segments = [segment for segment in console.render(view) if not segment.control]
    return list(Segment.split_lines(segments if color else Segment.remove_color(segments)))


def draw(
    lines: Sequence[Line], columns: int, theme: TerminalTheme, size: int = 22, *, smooth: bool = True
) -> Image.Image:
    """Draw lines of a terminal.

    Args:
        lines: The lines.
        columns: Width of the terminal.
        theme: The colors.
        size: Font size in pixels.
        smooth: Whether the edges of letters are smoothed. Without, files are much smaller.
    """
    cell_width, cell_height = _cell(size)
    image = Image.new("RGB", (columns * cell_width, len(lines) * cell_height), tuple(theme.background_color))
    canvas = ImageDraw.Draw(image)
    canvas.fontmode = "L" if smooth else "1"
    for row, line in enumerate(lines):
        column = 0
        for segment in line:
            foreground, background = _colors(segment.style or Style.null(), theme)
            width = cell_len(segment.text)
            left, top = column * cell_width, row * cell_height
            if background != theme.background_color:
                box = (left, top, left + width * cell_width - 1, top + cell_height - 1)
                canvas.rectangle(box, fill=tuple(background))
            _draw_text(canvas, (left, top), segment, tuple(foreground), size)
            column += width
    return image


def framed(image: Image.Image, theme: TerminalTheme, margin: int = 22) -> Image.Image:
    """Add a margin in the background color to a picture."""
    size = (image.width + 2 * margin, image.height + 2 * margin)
    picture = Image.new("RGB", size, tuple(theme.background_color))
    picture.paste(image, (margin, margin))
    return picture


def _colors(style: Style, theme: TerminalTheme) -> tuple[ColorTriplet, ColorTriplet]:
    """The color of the text and of its background."""
    foreground = (style.color or Color.default()).get_truecolor(theme)
    background = (style.bgcolor or Color.default()).get_truecolor(theme, foreground=False)
    if style.reverse:
        foreground, background = background, foreground
    return (blend_rgb(foreground, background, DIM) if style.dim else foreground), background


# --- Characters -------------------------------------------------------------------------------


@cache
def _font(size: int, bold: bool, italic: bool) -> ImageFont.FreeTypeFont:
    kind = {"": "", "BoldOblique": "-BoldOblique"}.get(name := "Bold" * bold + "Oblique" * italic, f"-{name}")
    # The basic layout places characters at whole pixels, so that each one is as wide as a cell.
    return ImageFont.truetype(str(FONTS / f"DejaVuSansMono{kind}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


def _cell(size: int) -> tuple[int, int]:
    """The width and the height of a cell in pixels."""
    return round(_font(size, False, False).getlength("M")), round(size * 1.3)


def _draw_text(
    canvas: ImageDraw.ImageDraw, corner: tuple[int, int], segment: Segment, color: tuple[int, ...], size: int
) -> None:
    """Draw the text of a segment, in runs that need only one call."""
    style = segment.style or Style.null()
    font = _font(size, bool(style.bold), bool(style.italic))
    (x, top), (width, height) = corner, _cell(size)
    ascent, descent = font.getmetrics()
    baseline = top + (height - ascent - descent) // 2 + ascent
    for drawn, run in groupby(segment.text, key=_is_drawn):
        text = "".join(run)
        if drawn:
            for n, char in enumerate(text):
                canvas.bitmap((x + n * width, top), _shape(char, width, height), fill=color)
        elif text.strip():
            canvas.text((x, baseline), text, fill=color, font=font, anchor="ls")
        if style.underline:
            canvas.line((x, baseline + 2, x + cell_len(text) * width - 1, baseline + 2), fill=color)
        x += cell_len(text) * width


def _is_drawn(char: str) -> bool:
    return char in _ARMS or "\u2580" <= char <= "\u259f"


# The arms of box-drawing characters: up, down, left, right.
_ARMS = {
    "─": "lr", "│": "ud", "┌": "dr", "┐": "dl", "└": "ur", "┘": "ul", "├": "udr", "┤": "udl", "┬": "dlr", "┴": "ulr",
    "┼": "udlr", "╭": "dr", "╮": "dl", "╰": "ur", "╯": "ul", "━": "lr", "┃": "ud", "╴": "l", "╵": "u", "╶": "r",
    "╷": "d",
}  # fmt: skip
_HEAVY, _ROUND = "━┃", "╭╮╰╯"
# The quadrants of U+2596 to U+259F: upper left, upper right, lower left, lower right.
_QUADRANTS = ("c", "d", "a", "acd", "ad", "abc", "abd", "b", "bc", "bcd")
_OVERSAMPLING = 8


@cache
def _shape(char: str, width: int, height: int) -> Image.Image:
    """The mask of a block element or a box-drawing character."""
    if char in _ARMS:
        return _box_lines(char, width, height)
    mask = Image.new("L", (width, height))
    canvas = ImageDraw.Draw(mask)
    for left, top, right, bottom in _rectangles(ord(char) - 0x2580):
        shade = 64 * (ord(char) - 0x2590) if char in "░▒▓" else 255
        box = (round(left * width), round(top * height), round(right * width) - 1, round(bottom * height) - 1)
        if box[0] <= box[2] and box[1] <= box[3]:
            canvas.rectangle(box, fill=shade)
    return mask


def _rectangles(index: int) -> list[tuple[float, float, float, float]]:
    """The rectangles of a block element: left, top, right, bottom, as shares of the cell.

    Args:
        index: The character's index in Unicode's block of block elements, which begins at U+2580.
    """
    if index == 0:  # upper half
        return [(0, 0, 1, 0.5)]
    if index <= 8:  # eighths from below
        return [(0, 1 - index / 8, 1, 1)]
    if index <= 15:  # eighths from the left, largest first
        return [(0, 0, (16 - index) / 8, 1)]
    if index == 16:  # right half
        return [(0.5, 0, 1, 1)]
    if index <= 19:  # shades
        return [(0, 0, 1, 1)]
    if index == 20:  # upper eighth
        return [(0, 0, 1, 1 / 8)]
    if index == 21:  # right eighth
        return [(7 / 8, 0, 1, 1)]
    places = {"a": (0, 0), "b": (0.5, 0), "c": (0, 0.5), "d": (0.5, 0.5)}
    return [(x, y, x + 0.5, y + 0.5) for x, y in (places[name] for name in _QUADRANTS[index - 22])]


def _box_lines(char: str, width: int, height: int) -> Image.Image:
    """Draw a box-drawing character on a larger mask, which is then reduced."""
    arms = _ARMS[char]
    stroke = max(1, round(height / 16)) * (2 if char in _HEAVY else 1)
    # The corner of the square in which the arms meet, at a whole pixel.
    x, y = (width - stroke) // 2 * _OVERSAMPLING, (height - stroke) // 2 * _OVERSAMPLING
    width, height, stroke = (n * _OVERSAMPLING for n in (width, height, stroke))
    mask = Image.new("L", (width, height))
    canvas = ImageDraw.Draw(mask)
    if char in _ROUND:
        # A quarter of a ring from the side of the cell to the vertical arm.
        right, down = "r" in arms, "d" in arms
        radius = width - x if right else x + stroke
        center_x, center_y = width if right else 0, y + radius if down else y + stroke - radius
        ring = (center_x - radius, center_y - radius, center_x + radius - 1, center_y + radius - 1)
        start = {"dr": 180, "dl": 270, "ur": 90, "ul": 0}[arms]
        canvas.arc(ring, start, start + 90, fill=255, width=stroke)
        top, bottom = (center_y, height) if down else (0, center_y)
        canvas.rectangle((x, top, x + stroke - 1, bottom - 1), fill=255)
    else:
        bars = {
            "u": (x, 0, x + stroke, y + stroke),
            "d": (x, y, x + stroke, height),
            "l": (0, y, x + stroke, y + stroke),
            "r": (x, y, width, y + stroke),
        }
        for left, top, right_side, bottom in (bars[arm] for arm in arms):
            canvas.rectangle((left, top, right_side - 1, bottom - 1), fill=255)
    return mask.reduce(_OVERSAMPLING)
