"""Pictures of README.md and docs/: pairs for light and dark pages, of files that exist."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from docs.make_images import FOLDER, PAIRS, SHEETS
from tests.helpers import ROOT
from tests.helpers.screenshots import THEMES

_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PAIR = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)-dark\.png">'
    r'\s*<img alt="[^"]+" src="([^"]+)\.png">\s*</picture>'
)


def test_pages_show_pairs_of_pictures() -> None:
    names = set()
    for page in _PAGES:
        text = page.read_text(encoding="utf-8")
        pairs = _PAIR.findall(text)
        assert len(pairs) == text.count("<picture>") == text.count("<img")
        assert all(dark == light for dark, light in pairs)
        assert all((page.parent / f"{name}{end}.png").exists() for name, _ in pairs for end in ("", "-dark"))
        names |= {name.rpartition("/")[2] for name, _ in pairs}
    assert names == set(PAIRS)


def test_every_picture_can_be_made_again() -> None:
    files = {f"{name}{end}.png" for name in PAIRS for end in ("", "-dark")} | {f"{name}.png" for name in SHEETS}
    assert {file.name for file in FOLDER.iterdir()} == files


@pytest.mark.parametrize("name", sorted(PAIRS.keys() - {"llama321BPicture"}))
def test_screens_have_the_background_of_their_theme(name: str) -> None:
    for theme, end in (("light", ""), ("dark", "-dark")):
        corner = Image.open(FOLDER / f"{name}{end}.png").convert("RGB").getpixel((0, 0))
        assert corner == tuple(THEMES[theme].background_color)
