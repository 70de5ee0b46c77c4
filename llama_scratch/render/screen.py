"""The screen of a session as a web page or an SVG picture, in the pages' colors.

rich exports the CSS rules for one theme at a time, so the dark theme is a second export. Its classes have the same
numbers, because all colors of a theme are different.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.color import parse_rgb_hex
from rich.console import Console
from rich.terminal_theme import TerminalTheme

from llama_scratch.render.palette import DARK_PALETTE, LIGHT_PALETTE

_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{light}
@media (prefers-color-scheme: dark) {{
{dark}
}}
body {{ margin: 0 auto; padding: clamp(1rem, 4vw, 3rem); max-width: max-content; }}
pre {{ margin: 0; overflow-x: auto; line-height: 1.3;
  font-size: clamp(.5rem, calc((100vw - 2rem) / {width} / .61), .95rem);
  font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
</style>
</head>
<body>
<pre>{code}</pre>
</body>
</html>
"""
# rich's template without the fonts that it loads from the network.
_SVG = re.sub(r"\s*@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
_ID = "screen"
# The terminal's eight colors, from black to white.
_ANSI = "ink", "red", "green", "yellow", "blue", "magenta", "cyan", "soft"
_NAMES = "paper", *_ANSI


def screen_html(console: Console, title: str) -> str:
    """Render the recorded output of a console as a web page.

    Args:
        console: A console created with record=True.
        title: Title of the page.
    """
    sheet = "html {{ background: {background}; color: {foreground}; }}\n{stylesheet}"
    return _HTML.format(
        title=escape(title),
        light=console.export_html(theme=_theme(LIGHT_PALETTE), clear=False, code_format=sheet),
        dark=console.export_html(theme=_theme(DARK_PALETTE), clear=False, code_format=sheet),
        width=console.width,
        code=console.export_html(theme=_theme(LIGHT_PALETTE), clear=False, code_format="{code}"),
    )


def screen_svg(console: Console, title: str) -> str:
    """Render the recorded output of a console as an SVG picture.

    Args:
        console: A console created with record=True.
        title: Title in the frame of the picture.
    """
    light = console.export_svg(title=title, theme=_theme(LIGHT_PALETTE), clear=False, code_format=_SVG, unique_id=_ID)
    dark = console.export_svg(theme=_theme(DARK_PALETTE), clear=False, code_format="{styles}", unique_id=_ID)
    # Backgrounds and the frame have fill colors instead of classes.
    fills = (f'[fill="{LIGHT_PALETTE[name]}"] {{ fill: {DARK_PALETTE[name]}; }}' for name in _NAMES)
    sheet = "\n".join((dark, *fills))
    return light.replace("</style>", f"@media (prefers-color-scheme: dark) {{\n{sheet}\n}}\n</style>", 1)


def _theme(palette: Mapping[str, str]) -> TerminalTheme:
    paper, ink, *_ = (parse_rgb_hex(palette[name][1:]) for name in _NAMES)
    colors: list[tuple[int, int, int]] = [parse_rgb_hex(palette[name][1:]) for name in _ANSI]
    return TerminalTheme(paper, ink, colors, colors)
