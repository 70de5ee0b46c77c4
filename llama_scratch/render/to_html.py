"""Render pages as HTML: one self-contained file with tooltips.

A report begins with its picture, and its sections are folded. Each file has a light and a dark theme. The template
escapes text from prompts and tokens, and the content security policy of the page allows only its own script.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup, escape
from rich.console import Console
from rich.text import Text

from llama_scratch.render import colors, palette, stream
from llama_scratch.render.code import highlighted
from llama_scratch.render.drawings.drawing import NARROW, WIDE, Drawing
from llama_scratch.render.lines import json_line
from llama_scratch.render.page import (
    Cell,
    Code,
    Finding,
    Gallery,
    Heatmap,
    Page,
    PageBlock,
    Paragraph,
    Running,
    Table,
    written,
)
from llama_scratch.render.pooling import pooled, pooling
from llama_scratch.render.report_page import ReportPage
from llama_scratch.render.surprise import NAMES
from llama_scratch.render.svg import svg
from llama_scratch.render.text import SPACE, figure

# Maximum (rows, columns) of a map with texts (a table), a map without texts (a canvas), and a map in a gallery.
_TEXTS, _DRAWN, _SMALL = (128, 256), (256, 256), (48, 48)
# The style words of rich, and the named styles, that have a CSS class.
_STYLES = frozenset(["dim", "bold", "italic", "underline", "red", "green", "yellow", "blue", "magenta", "cyan", *NAMES])
# Texts of table cells up to this length are not wrapped.
_SHORT = 24
# The names of components, as `NetworkPart` writes them.
_COMPONENT = re.compile(r"\b(L\d+\.(?:H\d+|ffn|attn))\b")
# A report shows only the end of a longer prompt.
_LONGEST_PROMPT = 160
# A longer bold paragraph is not a heading.
_LONGEST_HEADING = 100


def html(page: Page) -> str:
    """Render a page as one HTML file."""
    maps: list[dict[str, Any]] = []
    script = _file("page.js")
    return _template().render(
        title=page.headline,
        **(_report(page, maps) if isinstance(page, ReportPage) else {"parts": _parts(page.parts, maps), "names": {}}),
        maps=maps,
        source=", ".join(f"/source {name}" for name in page.source),
        maker=f"llama-scratch {version('llama-scratch')}",
        light_palette=palette.LIGHT_PALETTE,
        dark_palette=palette.DARK_PALETTE,
        light=_colors(colors.LIGHT, "light"),
        dark=_colors(colors.DARK, "dark"),
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    )


def _file(name: str) -> str:
    return files("llama_scratch.render").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    loader = PackageLoader("llama_scratch.render", "assets")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"token": _token, "linked": _linked}
    return environment.get_template("page.html")


def _token(text: str) -> Markup:
    """Mark up the visible spaces of a token: pale, with a possible line break before."""
    return Markup("<wbr><i>␣</i>").join(map(escape, text.split(SPACE)))


def _linked(text: str, names: Mapping[str, str]) -> Markup:
    """Link the names of components to their sections.

    Args:
        text: The text.
        names: The tooltip of each component that has a section or a map on the page.
    """
    if not names:
        return escape(text)
    link = Markup('<a href="#{0}" data-head="{0}" data-hover="{1}">{0}</a>')
    pieces = _COMPONENT.split(text)
    return Markup().join(link.format(piece, names[piece]) if piece in names else escape(piece) for piece in pieces)


# --- The template's values ----------------------------------------------------------------------


def _colors(scales: dict[str, tuple[str, ...]], theme: str) -> list[tuple[str, str, str]]:
    """The name, color and text color of each step of each scale, and of named styles."""
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


def _report(report: ReportPage, maps: list[dict[str, Any]]) -> dict[str, Any]:
    """The template's values for a report."""
    prompt = written(report.prompt).replace("\n", " ")
    names = {each.head: each.hover for each in report.stream.arcs}
    sections = [
        {
            "title": each.page.headline,
            "anchor": each.anchor,
            "finding": written(each.finding),
            "parts": _parts(each.rest, maps),
        }
        for each in report.sections
    ]
    anchors = {each.anchor: f"Go to {each.page.headline}." for each in report.sections if each.anchor}
    return {
        "prompt": prompt if len(prompt) <= _LONGEST_PROMPT else "…" + prompt[1 - _LONGEST_PROMPT :],
        "parts": _parts((report.finding,), maps),
        "stream": stream.values(report.stream),
        "aside": _parts(report.aside, maps),
        "sections": sections,
        "names": anchors | names,
    }


def _parts(parts: Iterable[PageBlock], maps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_part(part, maps) for part in parts]


def _part(part: PageBlock, maps: list[dict[str, Any]]) -> dict[str, Any]:
    match part:
        case Finding():
            text = written(part.text).replace(" %", "\N{NO-BREAK SPACE}%")
            return {"kind": "paragraph", "text": text, "style": "finding"}
        case Paragraph():
            style = _classes(part.style)
            heading = "bold" in style and len(part.text) <= _LONGEST_HEADING
            kind = "heading" if heading else "paragraph"
            return {"kind": kind, "text": written(part.text), "style": style}
        case Running():
            return {"kind": "running", "pieces": list(map(_piece, part.pieces))}
        case Table():
            return _table(part)
        case Heatmap():
            return _texts(part) if part.texts is not None else {"kind": "map"} | _map(part, _DRAWN, maps)
        case Gallery():
            small = [_map(heatmap, _SMALL, maps) | {"head": _name(heatmap.title)} for heatmap in part.maps]
            return {"kind": "gallery", "title": written(part.title), "maps": small, "columns": part.columns}
        case Code():
            return _code(part)
        case Drawing():
            pictures = [svg(part, WIDE, "drawing wide"), svg(part, NARROW, "drawing narrow")]
            return {"kind": "drawing", "title": written(part.title), "pictures": pictures}


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
            _cell(cell) | _bar(cell, row, part, signed) | ({"kind": column["kind"]} if column["kind"] else {})
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


def _bar(cell: Cell, row: tuple[Cell, ...], table: Table, both: bool) -> dict[str, Any]:
    """The left edge and the width of a cell's bar, in percent of its track."""
    if cell.bar is None:
        return {"bar": None}
    bar = max(-1.0, min(1.0, cell.bar))
    left = 50 + min(0.0, 50 * bar) if both else 0.0
    width = abs(bar) * (50 if both else 100)
    hover = written(cell.hover) or _sentence(row, table) or figure(bar)
    return {"bar": bar, "both": both, "left": round(left, 2), "width": round(width, 2), "hover": hover}


def _sentence(row: tuple[Cell, ...], table: Table) -> str:
    """Describe a row, such as "␣Paris: probability 77.3 %."; "" if it has no text."""
    subject, *texts = (written(cell.text, token=cell.token) for cell in row)
    names = (written(name.removeprefix(">")) for name in table.columns[1:])
    facts = ", ".join(f"{name} {text}".strip() for name, text in zip(names, texts, strict=True) if text)
    said = ": ".join(filter(None, (subject, facts)))
    return said and f"{said}."


def _map(whole: Heatmap, max_fields: tuple[int, int], maps: list[dict[str, Any]]) -> dict[str, Any]:
    """Convert a map that the page's script draws, and append its values to `maps`."""
    drawn = pooled(whole, *max_fields)
    hovers = drawn.hovers and [[written(hover) for hover in row] for row in drawn.hovers]
    maps.append(
        {
            "rows": [drawn.row(r) for r in range(len(drawn.rows))],
            "columns": [drawn.column(c) for c in range(len(drawn.columns))],
            "values": [[_rounded(value) for value in row] for row in drawn.values],
            "hovers": hovers,
            "says": written(drawn.says),
            "percent": drawn.scale.percent,
            "marked": drawn.marked,
            "low": drawn.scale.low,
            "high": drawn.scale.high,
            "signed": drawn.scale.signed,
            "steps": colors.STEPS,
        }
    )
    return {"number": len(maps) - 1, "title": written(whole.title)} | _legend(whole, drawn)


def _name(title: str) -> str:
    """The component whose name a title begins with."""
    return match[0] if (match := _COMPONENT.match(title)) else ""


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _legend(whole: Heatmap, shown: Heatmap) -> dict[str, Any]:
    """The legend of a map: the steps and ends of its scale, or the kinds of fields."""
    steps = range(0, colors.STEPS, 2)
    (low, high), labels = whole.scale.ends(whole.values), whole.scale.labels(whole.values)
    scale = [f"m{step}" for step in reversed(steps)] if low < 0 else []
    if high > 0 or low >= 0:
        scale += [f"{'p' if whole.scale.signed else 'v'}{step}" for step in steps]
    kinds = [
        {"letter": written(kind.letter), "name": written(kind.name), "shade": f"{kind.hue}{colors.STEPS - 1}"}
        for kind in whole.scale.kinds
    ]
    ends = {"low": labels[0], "high": labels[1]}
    return {"scale": scale, "kinds": kinds, "legend": written(whole.scale.legend), "note": pooling(whole, shown)} | ends


def _texts(whole: Heatmap) -> dict[str, Any]:
    """Convert a map with texts, which becomes a table."""
    shown = pooled(whole, *_TEXTS)
    rows = [
        {
            "label": {"text": shown.row(r), "token": shown.row_tokens, "style": ""},
            "beside": written(shown.margin.texts[r]) if shown.margin else "",
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
    table |= {"compact": bool(whole.scale.kinds), "at_end": whole.window.first is None}
    table["beside"] = written(whole.margin.title) if whole.margin else ""
    return table | _legend(whole, shown)


def _code(part: Code) -> dict[str, Any]:
    console = Console(file=io.StringIO())
    lines = [
        {"number": part.first + n, "marked": n + 1 in part.marked, "pieces": list(_pieces(line, console))}
        for n, line in enumerate(highlighted(part))
    ]
    return {"kind": "code", "place": written(part.location), "lines": lines}


def _pieces(line: Text, console: Console) -> Iterator[dict[str, str]]:
    """Split a line of source code into pieces of one style each."""
    for segment in line.render(console):
        style = segment.style
        color = style.color.name.removeprefix("bright_") if style and style.color else ""
        words = [color, "bold" if style and style.bold else "", "dim" if style and style.dim else ""]
        yield {"text": segment.text, "style": _classes(" ".join(words))}
