"""Render pages as HTML: one self-contained file with tooltips.

The file has a light and a dark theme. The template escapes text from prompts and tokens, and the page's content
security policy allows only its own script.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup, escape
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from llama_scratch.render import colors
from llama_scratch.render.lines import json_line
from llama_scratch.render.page import (
    Cell,
    Code,
    Finding,
    Gallery,
    Heatmap,
    Page,
    Paragraph,
    Running,
    Table,
    figure,
    written,
)
from llama_scratch.render.pooling import pooled, pooling
from llama_scratch.render.surprise import NAMES
from llama_scratch.render.text import SPACE

# Maximum (rows, columns) of a map with texts (a table), a map without texts (a canvas), and a map in a gallery.
_TEXTS, _DRAWN, _SMALL = (128, 256), (256, 256), (48, 48)
# The style words of rich, and the named styles, that have a CSS class.
_STYLES = frozenset(["dim", "bold", "italic", "underline", "red", "green", "yellow", "blue", "magenta", "cyan", *NAMES])
# Texts of table cells up to this length are not wrapped.
_SHORT = 24
# A longer bold paragraph is not a heading.
_LONGEST_HEADING = 100


def html(page: Page) -> str:
    """Render a page as one HTML file."""
    maps: list[dict[str, Any]] = []
    parts = [_part(part, number, maps) for number, part in enumerate(page.parts)]
    script = _file("page.js")
    return _template().render(
        title=page.headline,
        parts=parts,
        headings=[part for part in parts if part["kind"] == "heading"],
        maps=maps,
        source=", ".join(f"/source {name}" for name in page.source),
        maker=f"llama-scratch {version('llama-scratch')}",
        light=_colors(colors.LIGHT, "light"),
        dark=_colors(colors.DARK, "dark"),
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    )


def _file(name: str) -> str:
    return files("llama_scratch.render").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["token"] = _token
    return environment.from_string(_file("page.html"))


def _token(text: str) -> Markup:
    """Mark up a token's visible spaces: they are pale, and a line may break before them."""
    return Markup("<wbr><i>␣</i>").join(map(escape, text.split(SPACE)))


# --- The template's values ----------------------------------------------------------------------


def _colors(scales: dict[str, tuple[str, ...]], theme: str) -> list[tuple[str, str, str]]:
    """The name, the color and the text color of each step of each scale, of the mark, and of the surprise styles."""
    steps = [
        (f"{name}{step}", color, colors.ink_on(name, color, theme))
        for name, stops in scales.items()
        for step, color in enumerate(colors.steps(stops))
    ]
    named = [("answer", colors.MARK[theme]), *zip(NAMES[1:], colors.SURPRISE[theme][1:], strict=True)]
    return [*steps, *((name, color, colors.ink(color)) for name, color in named)]


def _field_class(heatmap: Heatmap, row: int, column: int) -> str:
    """The CSS class of a field."""
    shade = heatmap.shade(row, column)
    if shade is None:
        return ""
    return "answer" if heatmap.mark(row, column) else f"{shade[0]}{colors.step(shade[1])}"


def _classes(style: str) -> str:
    return " ".join(word for word in style.split() if word in _STYLES)


def _part(part: object, number: int, maps: list[dict[str, Any]]) -> dict[str, Any]:
    match part:
        case Finding():
            return {"kind": "paragraph", "id": f"part-{number}", "text": written(part.text), "style": "finding"}
        case Paragraph():
            style = _classes(part.style)
            heading = "bold" in style and len(part.text) <= _LONGEST_HEADING
            kind = "heading" if heading else "paragraph"
            return {"kind": kind, "id": f"part-{number}", "text": written(part.text), "style": style}
        case Running():
            return {"kind": "running", "pieces": list(map(_piece, part.pieces))}
        case Table():
            return _table(part)
        case Heatmap():
            return _texts(part) if part.texts is not None else {"kind": "map"} | _map(part, _DRAWN, maps)
        case Gallery():
            small = [_map(heatmap, _SMALL, maps) for heatmap in part.maps]
            return {"kind": "gallery", "title": written(part.title), "maps": small, "columns": part.columns}
        case Code():
            return _code(part)
    raise TypeError(f"{type(part).__name__} is not a block of a page")


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "text": written(cell.text, token=cell.token),
        "token": cell.token,
        "style": _classes(cell.style),
        "hover": written(cell.hover),
        "kind": "s" if len(cell.text) <= _SHORT else "",
    }


def _piece(cell: Cell) -> dict[str, Any]:
    piece = _cell(cell) | {"breaks": cell.token and "\n" in cell.text}
    if cell.token and not cell.hover:
        piece["hover"] = written(json_line(cell.text))  # the exact text
    return piece


def _table(part: Table) -> dict[str, Any]:
    both = [any((row[i].bar or 0) < 0 for row in part.rows) for i in range(len(part.columns))]
    columns: list[dict[str, Any]] = [
        {"name": written(name.removeprefix(">")), "kind": "n" if name[:1] == ">" else ""} for name in part.columns
    ]
    rows = [
        [
            _cell(cell) | _bar(cell, row, signed) | ({"kind": column["kind"]} if column["kind"] else {})
            for cell, column, signed in zip(row, columns, both, strict=True)
        ]
        for row in part.rows
    ]
    for i, column in enumerate(columns):
        if any(row[i].bar is not None for row in part.rows):
            column["kind"] = "b"
            column["letters"] = max(len(row[i].text) for row in part.rows)
    wide = any(column["kind"] == "b" for column in columns)
    return {"kind": "table", "title": written(part.title), "columns": columns, "rows": rows, "wide": wide}


def _bar(cell: Cell, row: tuple[Cell, ...], both: bool) -> dict[str, Any]:
    """The left edge and the width of a cell's bar, in percent of its track."""
    if cell.bar is None:
        return {"bar": None}
    bar = max(-1.0, min(1.0, cell.bar))
    left = 50 + min(0.0, 50 * bar) if both else 0.0
    width = abs(bar) * (50 if both else 100)
    said = [written(other.text, token=other.token) for other in row if other.text]
    hover = written(cell.hover) or ", ".join(said) or figure(bar)
    return {"bar": bar, "both": both, "left": round(left, 2), "width": round(width, 2), "hover": hover}


def _map(whole: Heatmap, max_fields: tuple[int, int], maps: list[dict[str, Any]]) -> dict[str, Any]:
    """Convert a map that the page's script draws. Appends its values to `maps`."""
    drawn = pooled(whole, *max_fields)
    hovers = drawn.hovers and [[written(hover) for hover in row] for row in drawn.hovers]
    maps.append(
        {
            "rows": [drawn.row(r) for r in range(len(drawn.rows))],
            "columns": [drawn.column(c) for c in range(len(drawn.columns))],
            "values": [[_rounded(value) for value in row] for row in drawn.values],
            "hovers": hovers,
            "says": written(drawn.says),
            "percent": drawn.percent,
            "marked": drawn.marked,
            "low": drawn.low,
            "high": drawn.high,
            "signed": drawn.signed,
            "steps": colors.STEPS,
        }
    )
    return {"number": len(maps) - 1, "title": written(whole.title)} | _legend(whole, drawn)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _legend(whole: Heatmap, shown: Heatmap) -> dict[str, Any]:
    """What the values are, with the steps of the scale between its ends, or the kinds of fields."""
    steps = range(0, colors.STEPS, 2)
    (low, high), labels = whole.ends, whole.labels
    scale = [f"m{step}" for step in reversed(steps)] if low < 0 else []
    if high > 0 or low >= 0:
        scale += [f"{'p' if whole.signed else 'v'}{step}" for step in steps]
    kinds = [
        {"letter": written(kind.letter), "name": written(kind.name), "shade": f"{kind.hue}{colors.STEPS - 1}"}
        for kind in whole.kinds
    ]
    ends = {"low": labels[0], "high": labels[1]}
    return {"scale": scale, "kinds": kinds, "legend": written(whole.legend), "note": pooling(whole, shown)} | ends


def _texts(whole: Heatmap) -> dict[str, Any]:
    """Convert a map with texts, which becomes a table."""
    shown = pooled(whole, *_TEXTS)
    rows = [
        {
            "label": {"text": shown.row(r), "token": shown.row_tokens, "style": ""},
            "first": r == 0,
            "beside": written(shown.beside[r]) if shown.beside else "",
            "fields": [
                {
                    "text": shown.text(r, c),
                    "token": shown.tokens,
                    "style": "",
                    "shade": _field_class(shown, r, c),
                    "hover": shown.hover(r, c),
                }
                for c in range(len(shown.columns))
            ],
        }
        for r in range(len(shown.rows))
    ]
    columns = [{"text": shown.column(c), "token": shown.tokens, "style": ""} for c in range(len(shown.columns))]
    table: dict[str, Any] = {"kind": "texts", "title": written(whole.title), "columns": columns, "rows": rows}
    table |= {"beside": written(whole.beside_title), "compact": bool(whole.kinds), "at_end": whole.first is None}
    return table | _legend(whole, shown)


def _code(part: Code) -> dict[str, Any]:
    syntax = Syntax("", part.language, theme="ansi_dark")
    text = syntax.highlight("\n".join(map(written, part.text.splitlines())))
    console = Console(file=io.StringIO())
    lines = [
        {"number": part.first + n, "marked": n + 1 in part.marked, "pieces": list(_pieces(line, console))}
        for n, line in enumerate(text.split("\n"))
    ]
    return {"kind": "code", "place": f"{written(part.path)}:{part.first}", "lines": lines}


def _pieces(line: Text, console: Console) -> Iterator[dict[str, str]]:
    """Split a line of source code into pieces of one style each."""
    for segment in line.render(console):
        style = segment.style
        color = style.color.name.removeprefix("bright_") if style and style.color else ""
        words = [color, "bold" if style and style.bold else "", "dim" if style and style.dim else ""]
        yield {"text": segment.text, "style": _classes(" ".join(words))}
