"""Paint the shapes of a drawing on a sheet."""

from __future__ import annotations

from llama_scratch.render import colors
from llama_scratch.render.drawings.drawing import Box, Disc, Label, Picture, Stroke
from llama_scratch.render.palette import LIGHT_PALETTE
from llama_scratch.render.sheet import WIDTH, Sheet, scale_of

_POINTS = 72  # points per inch


def paint(sheet: Sheet, picture: Picture, x: float, y: float, inch: float) -> None:
    """Paint a picture.

    Args:
        sheet: The sheet.
        picture: The picture.
        x: Left edge on the sheet, in inches.
        y: Top edge on the sheet, in inches.
        inch: Inches per pixel of the picture.
    """
    from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

    axes = sheet.figure.add_axes(
        (x / WIDTH, 1 - (y + picture.high * inch) / sheet.height, picture.wide * inch / WIDTH,
         picture.high * inch / sheet.height)
    )  # fmt: skip
    axes.set(xlim=(0, picture.wide), ylim=(picture.high, 0))
    axes.axis("off")
    width = inch * _POINTS  # points per pixel
    for order, shape in enumerate(picture.shapes):
        match shape:
            case Box():
                edge, place = _color(shape.edge), (shape.x, shape.y)
                box = Rectangle(place, shape.wide, shape.high, facecolor=_color(shape.fill), edgecolor=edge)
                axes.add_patch(box).set(zorder=order, linewidth=width, clip_on=False)
            case Disc():
                edge, place = _color(shape.edge), (shape.x, shape.y)
                disc = Circle(place, shape.radius, facecolor=_color(shape.fill), edgecolor=edge)
                axes.add_patch(disc).set(zorder=order, linewidth=width, clip_on=False)
            case Stroke():
                ends, style = ((shape.x, shape.y), (shape.to_x, shape.to_y)), "->" if shape.arrow else "-"
                line = FancyArrowPatch(
                    *ends, arrowstyle=style, mutation_scale=9 * width, shrinkA=0, shrinkB=0, color=_color(shape.color)
                )
                axes.add_patch(line).set(zorder=order, linewidth=shape.thickness * width, clip_on=False)
            case Label():
                left, top = x + shape.x * inch, y + shape.y * inch
                sheet.write(
                    left, top, shape.text, shape.size * width, color=_color(shape.color), mono=shape.mono,
                    bold=shape.bold, centered=shape.centered,
                )  # fmt: skip


def _color(name: str) -> str:
    """Look up a color by its name, for a light background."""
    if name in LIGHT_PALETTE:
        return LIGHT_PALETTE[name]
    scale = name.removeprefix("on-")
    color = scale_of(scale[0])[int(scale[1:])]
    return colors.ink(color) if name != scale else color
