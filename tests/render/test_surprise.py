"""Surprisal as a scale: its order is visible to color-blind readers, and without color."""

from __future__ import annotations

from itertools import pairwise

import pytest

from llama_scratch.render import colors
from llama_scratch.render.surprise import NAMES, surprise_style, terminal_styles
from tests.helpers.color_vision import VISION, difference, seen

# Backgrounds of common terminals, and of pages and pictures.
BACKGROUNDS = {
    "light": ("#ffffff", "#fdf6e3", "#fcfcfa"),
    "dark": ("#000000", "#1e1e2e", "#282a36", "#17181d"),
}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_color_difference_against_published_values(
    first: tuple[float, float, float], second: tuple[float, float, float], expected: float
) -> None:
    """Pairs of Sharma, Wu & Dalal 2005, table 1."""
    assert difference(first, second) == pytest.approx(expected, abs=1e-4)
    assert difference(second, first) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(
    ("theme", "background"), [(theme, color) for theme, colors_ in BACKGROUNDS.items() for color in colors_]
)
def test_neighboring_classes_differ_for_every_reader(theme: str, background: str, vision: str) -> None:
    shades = [seen(color or background, vision) for color in colors.SURPRISE[theme]]
    assert min(difference(a, b) for a, b in pairwise(shades)) >= 10
    lights = [shade[0] for shade in shades]
    assert lights == sorted(lights, reverse=theme == "light")


def test_the_former_colors_fail_this_bound() -> None:
    """Magenta text is nearly that of plain text on this theme."""
    assert difference(seen("#f5c2e7", "deuteranopia"), seen("#cdd6f4", "deuteranopia")) < 10


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_text_is_legible_on_each_background(theme: str) -> None:
    for color in [*colors.SURPRISE[theme][1:], colors.MARK[theme]]:
        high, low = sorted(map(colors.luminance, (color, colors.ink(color))), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_with_few_colors_the_emphasis_grows() -> None:
    styles = terminal_styles(truecolor=False)
    assert [styles[name] for name in NAMES] == ["", "underline", "bold underline", "bold reverse"]


def test_the_background_of_the_terminal_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLORFGBG", "0;15")
    assert terminal_styles(truecolor=True)["surprise3"].endswith(colors.SURPRISE["light"][3])
    for value in ("15;0", "", "default;default"):
        monkeypatch.setenv("COLORFGBG", value)
        assert terminal_styles(truecolor=True)["surprise3"].endswith(colors.SURPRISE["dark"][3])


def test_each_class_has_a_style() -> None:
    styles = [surprise_style(bits) for bits in (0.0, 0.99, 1.0, 3.99, 4.0, 7.99, 8.0, 30.0)]
    assert styles == [name for name in NAMES for _ in range(2)]
    assert surprise_style(None) == ""
