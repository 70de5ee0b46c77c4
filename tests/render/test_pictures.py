"""Every view at 40, 80, 100 and 160 columns, dark and light, with and without color, against committed pictures.

After a change of a view, draw its picture again with `python -m tests.render.views` and look at it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import TerminalTheme

from llama_scratch.render.colors import luminance
from tests.helpers.screenshots import DIM, THEMES, draw
from tests.render.views import PICTURES, SHEETS, VIEWS, WIDTHS, difference, lines, path_of, reduced, sheet

# The largest difference between the mean colors of two blocks of 4 × 4 pixels, of 255. One pixel of black on white is
# 16. The versions of Pillow from 9.5 to 13 draw the same pixels, as letters are not smoothed.
TOLERANCE = 6


@pytest.mark.parametrize("theme", SHEETS)
@pytest.mark.parametrize("name", VIEWS)
def test_views_equal_their_pictures(name: str, theme: str, tmp_path: Path) -> None:
    drawn, committed = sheet(name, theme), Image.open(path_of(name, theme))
    file = tmp_path / f"{name}-{theme}.png"
    drawn.save(file)
    assert drawn.size == committed.size, f"The size of the view has changed. It is now {file}"
    changed = difference(drawn, committed)
    changed.resize(drawn.size).save(tmp_path / "difference.png")
    assert strongest(changed) <= TOLERANCE, f"The view has changed. It is now {file}, with difference.png beside it"


def strongest(changed: Image.Image) -> int:
    """The largest value of a difference."""
    _, most = changed.getextrema()
    assert isinstance(most, int)
    return most


def test_all_pictures_belong_to_a_view_and_are_small() -> None:
    files = list(PICTURES.iterdir())
    assert set(files) == {path_of(name, theme) for name in VIEWS for theme in SHEETS}
    assert sum(file.stat().st_size for file in files) < 3_000_000


def test_the_smallest_change_of_a_digit_is_above_the_tolerance() -> None:
    """5 and 6 differ least, in one pixel, and dim text has the least contrast."""
    screens = [
        draw([[Segment(f"77.{digit} %", Style(dim=True))]], 10, THEMES["dark"], 11, smooth=False) for digit in (5, 6)
    ]
    assert strongest(difference(*screens)) > TOLERANCE


@pytest.mark.parametrize("name", ["lens", "why"])
def test_the_palette_of_a_file_keeps_the_colors(name: str) -> None:
    drawn = sheet(name, "light")
    assert strongest(difference(drawn, reduced(drawn))) == 0


@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", VIEWS)
def test_views_fit_the_terminal(name: str, columns: int, color: bool) -> None:
    for line in lines(name, columns, color=color):
        assert Segment.get_line_length(list(line)) <= columns
        assert color or not any(segment.style and (segment.style.color or segment.style.bgcolor) for segment in line)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", VIEWS)
def test_the_answer_is_not_cut_to_an_ellipsis(name: str, columns: int) -> None:
    """The last column of a heat map has the answer. If it is cut, it keeps at least one character."""
    texts = ["".join(segment.text for segment in line).rstrip() for line in lines(name, columns)]
    assert [text for text in texts if re.search(r"(^|  |[␣·░▒▓█])…$", text)] == []


# --- How screens are drawn ----------------------------------------------------------------------


@pytest.mark.parametrize("theme", THEMES)
def test_the_colors_of_the_themes_are_legible(theme: str) -> None:
    """The colors of texts against the background: 4.5 as WCAG asks for, 3 for secondary text."""
    colors = THEMES[theme]
    for number in (1, 2, 3, 4, 5, 6):  # red to cyan
        assert contrast(colors, tuple(colors.ansi_colors[number])) >= 4.5
    assert contrast(colors, tuple(colors.foreground_color)) >= 7
    assert contrast(colors, tuple(colors.ansi_colors[8])) >= 3  # bright black
    dim = zip(colors.foreground_color, colors.background_color, strict=True)
    assert contrast(colors, tuple(round(text + DIM * (paper - text)) for text, paper in dim)) >= 3


def contrast(theme: TerminalTheme, color: tuple[int, ...]) -> float:
    """The contrast of a color to the background, 1 to 21 (WCAG 2)."""
    darker, lighter = sorted(luminance(f"#{bytes(each).hex()}") for each in (tuple(theme.background_color), color))
    return (lighter + 0.05) / (darker + 0.05)
