"""Text layout for pictures: fonts, text widths and line breaks. Sizes are points."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an extra
    from matplotlib.font_manager import FontProperties
    from matplotlib.ft2font import FT2Font

# The width of a DejaVu Sans Mono character in inches, per point of font size.
LETTER = 0.602 / 72


def _font_file(mono: bool, bold: bool) -> str:
    """The path of a font bundled with matplotlib.

    Pictures are then the same on every machine.
    """
    import matplotlib

    name = f"DejaVuSans{'Mono' if mono else ''}{'-Bold' if bold else ''}.ttf"
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@cache
def _face(mono: bool, bold: bool) -> FT2Font:
    from matplotlib.ft2font import FT2Font

    return FT2Font(_font_file(mono, bold))


def font(mono: bool, bold: bool, size: float) -> FontProperties:
    """Return matplotlib's font properties.

    Args:
        mono: Whether the font is monospaced.
        bold: Whether the font is bold.
        size: Font size.
    """
    from matplotlib.font_manager import FontProperties

    return FontProperties(fname=_font_file(mono, bold), size=size)


def drawable(text: str, mono: bool, bold: bool) -> str:
    """Escape the characters that a font lacks.

    Args:
        text: The text.
        mono: Whether the font is monospaced.
        bold: Whether the font is bold.
    """
    face = _face(mono, bold)
    return "".join(c if face.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text)


def text_width(text: str, size: float, mono: bool = False, bold: bool = False) -> float:
    """Measure the width of a text in inches.

    Args:
        text: The text.
        size: Font size.
        mono: Whether the font is monospaced.
        bold: Whether the font is bold.
    """
    face = _face(mono, bold)
    face.set_size(size, 72)
    face.set_text(drawable(text, mono, bold))
    return float(face.get_width_height()[0]) / 64 / 72


def line_height(size: float) -> float:
    """The height of a line, in inches."""
    return 1.55 * size / 72


def cut(text: str, room: float, size: float, mono: bool = False, bold: bool = False) -> str:
    """Truncate a text with … to a maximum width.

    Args:
        text: The text.
        room: Maximum width in inches.
        size: Font size.
        mono: Whether the font is monospaced.
        bold: Whether the font is bold.
    """
    if text_width(text, size, mono, bold) <= room:
        return text
    while text and text_width(text + "…", size, mono, bold) > room:
        text = text[:-1]
    return text + "…"


def wrapped(text: str, room: float, size: float, bold: bool) -> Iterator[str]:
    """Wrap a text into lines of a maximum width. Only a single word may exceed it.

    Args:
        text: The text.
        room: Maximum width in inches.
        size: Font size.
        bold: Whether the font is bold.
    """
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and text_width(longer, size, bold=bold) > room:
                yield line
                line = word
            else:
                line = longer
        yield line
