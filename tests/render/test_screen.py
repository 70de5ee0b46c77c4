"""The screen of a session as a web page and as SVG."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.text import Text

from llama_scratch.render.page import written
from llama_scratch.render.palette import DARK_PALETTE, LIGHT_PALETTE
from llama_scratch.render.screen import screen_html, screen_svg
from tests.helpers.pages import HOSTILE

STYLES = ("red", "bold green", "dim", "dim cyan", "on blue", "magenta", "bright_black", "yellow", "#123456 on #fedcba")


def console() -> Console:
    """A console that has printed a word in each style."""
    console = Console(record=True, file=io.StringIO(), width=60, emoji=False)
    for style in STYLES:
        console.print(Text(style, style=style))
    console.print(written(HOSTILE), markup=False, highlight=False)
    return console


@pytest.mark.parametrize("render", [screen_html, screen_svg])
def test_each_style_has_the_palette_of_both_themes(render: object) -> None:
    assert callable(render)
    text = render(console(), "A <title>")
    light, dark = text.split("@media (prefers-color-scheme: dark)", 1)
    rules = [re.findall(r"r(\d+) \{+\s*([^}]*)\}", sheet) for sheet in (light, dark)]
    assert len(rules[0]) >= len(STYLES) - 1  # a background alone is not a rule of an SVG
    assert [number for number, _ in rules[0]] == [number for number, _ in rules[1]]
    for (_, in_light), (_, in_dark) in zip(*rules, strict=True):
        for name in ("red", "green", "blue", "magenta", "yellow"):
            assert (LIGHT_PALETTE[name] in in_light) == (DARK_PALETTE[name] in in_dark)
    for name in ("red", "green", "magenta", "yellow"):
        assert any(LIGHT_PALETTE[name] in rule for _, rule in rules[0])
    assert sum("#123456" in rule for sheet in rules for _, rule in sheet) == 2  # a color of its own stays


@pytest.mark.parametrize("render", [screen_html, screen_svg])
def test_it_loads_and_runs_nothing(render: object) -> None:
    assert callable(render)
    text = render(console(), "A <title>")
    assert "<script" not in text
    assert "<title>A <" not in text
    assert not re.search(r"url\(\"?http|@font-face|(?:src|href)=", text)
    if render is screen_svg:
        ElementTree.fromstring(text)
