"""Paint the shapes of a drawing as SVG within a page."""

from __future__ import annotations

import math

from markupsafe import Markup

from llama_scratch.render.drawings.drawing import Box, Disc, Drawing, Label, Picture, Shape, Stroke
from llama_scratch.render.page import written


def svg(drawing: Drawing, width: int, kind: str) -> Markup:
    """Paint a drawing. Its colors are CSS variables, which follow the page's theme.

    Args:
        drawing: The drawing.
        width: The width, `WIDE` or `NARROW`.
        kind: The CSS class.
    """
    picture: Picture = drawing.picture(width)
    size = f"{picture.wide:g} {picture.high:g}"
    head = Markup('<svg class="{}" viewBox="0 0 {}" width="{}" role="img" aria-label="{}">').format(
        kind, size, f"{picture.wide:g}", written(drawing.title)
    )
    return head + Markup("\n").join(map(_shape, picture.shapes)) + Markup("</svg>")


def _color(name: str) -> str:
    return f"var(--{name})"


def _hover(hover: str) -> Markup:
    return Markup(' data-hover="{}"').format(written(hover)) if hover else Markup("")


def _shape(shape: Shape) -> Markup:
    match shape:
        case Box():
            size = Markup('x="{:g}" y="{:g}" width="{:g}" height="{:g}"').format(
                shape.x, shape.y, shape.wide, shape.high
            )
            style = Markup('rx="3" fill="{}" stroke="{}"').format(_color(shape.fill), _color(shape.edge))
            return Markup("<rect {} {}{}/>").format(size, style, _hover(shape.hover))
        case Disc():
            place = Markup('cx="{:g}" cy="{:g}" r="{:g}"').format(shape.x, shape.y, shape.radius)
            style = Markup('fill="{}" stroke="{}"').format(_color(shape.fill), _color(shape.edge))
            return Markup("<circle {} {}{}/>").format(place, style, _hover(shape.hover))
        case Stroke():
            return _stroke(shape)
        case Label():
            style = Markup('style="font-size: {:g}px" fill="{}" class="{}" text-anchor="{}"').format(
                shape.size,
                _color(shape.color),
                "t" if shape.mono else "",
                "middle" if shape.centered else "start",
            )
            bold = Markup(' font-weight="650"') if shape.bold else Markup("")
            return Markup('<text x="{:g}" y="{:g}" dy="0.35em" {}{}>{}</text>').format(
                shape.x, shape.y, style, bold, written(shape.text)
            )


def _stroke(shape: Stroke) -> Markup:
    path = f"M{shape.x:g} {shape.y:g}L{shape.to_x:g} {shape.to_y:g}"
    if shape.arrow:
        angle = math.atan2(shape.to_y - shape.y, shape.to_x - shape.x)
        for turn in (angle + 2.6, angle - 2.6):
            path += f"M{shape.to_x:g} {shape.to_y:g}l{6 * math.cos(turn):.1f} {6 * math.sin(turn):.1f}"
    style = f'stroke="{_color(shape.color)}" stroke-width="{shape.thickness:g}" stroke-linecap="round" fill="none"'
    return Markup(f'<path d="{path}" {style}/>')
