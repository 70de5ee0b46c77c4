"""Shades of heat maps on a terminal.

With 24-bit color, the background of a field shows its value. On other terminals, positive values are block characters
and negative values are strokes, so a map can be read without color.
"""

from __future__ import annotations

from functools import cache

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from llama_scratch.render import colors
from llama_scratch.render.bars import has_blocks
from llama_scratch.render.page import Heatmap

# Characters from weakest to strongest, with and without Unicode.
_POSITIVE, _POSITIVE_ASCII = " ·░▒▓█", " .:+*#"
_NEGATIVE, _NEGATIVE_ASCII = " ‐-=≡≣", " `-=xX"
# Upper limits of the first five shades.
_LIMITS = (0.02, 0.1, 0.3, 0.55, 0.8)
# Styles with the terminal's 16 colors for the hues of kinds.
_HUES = {"gray": "dim", "blue": "blue", "amber": "yellow", "pink": "magenta"}
# Number of cells of the legend for a scale, or for one half of a diverging scale.
_SCALE = 12


def has_truecolor(console: Console) -> bool:
    """Whether a terminal has 24-bit color. rich detects it from COLORTERM."""
    return console.color_system == "truecolor" and not console.no_color


@cache
def _scales(theme: str) -> dict[str, list[str]]:
    """The colors of each scale."""
    scales = colors.LIGHT if theme == "light" else colors.DARK
    return {name: colors.steps(stops) for name, stops in scales.items()}


class Shades:
    """The characters and styles of the fields of a heat map on one terminal."""

    def __init__(self, heatmap: Heatmap, console: Console, options: ConsoleOptions):
        self.heatmap = heatmap
        self.truecolor = has_truecolor(console)
        blocks = has_blocks(options)
        self._block = "█" if blocks else "#"
        self._positive = _POSITIVE if blocks else _POSITIVE_ASCII
        self._negative = _NEGATIVE if blocks else _NEGATIVE_ASCII
        self._marker = "▸" if blocks else ">"
        self._theme = colors.terminal_theme()
        self._scales = _scales(self._theme)

    def shade(self, row: int, column: int) -> tuple[str, str]:
        """The character and the style of a field without its text.

        Args:
            row: Row of the field.
            column: Column of the field.
        """
        level = self.heatmap.scale.level(self.heatmap.values[row][column])
        if level is None:
            return " ", ""
        if self.truecolor:
            return " ", self.text_style(row, column)
        if self.heatmap.mark(row, column):
            return self._marker, "bold"
        step = sum(abs(level) > limit for limit in _LIMITS)
        strength = ("dim", "dim", "", "", "", "bold")[step]
        if self.heatmap.scale.kinds:
            return self._positive[step], f"{strength} {self._hue(row, column)}".strip()
        if level < 0:
            return self._negative[step], f"{strength} red".strip()
        return self._positive[step], f"{strength} green".strip()

    def text_style(self, row: int, column: int) -> str:
        """The style of the text in a field.

        Args:
            row: Row of the field.
            column: Column of the field.
        """
        shade = self.heatmap.shade(row, column)
        if shade is None:
            return ""
        marked = self.heatmap.mark(row, column)
        if self.truecolor:
            if marked:
                return f"bold {colors.ink(colors.MARK[self._theme])} on {colors.MARK[self._theme]}"
            color = self._scales[shade[0]][colors.step(shade[1])]
            return f"{colors.ink_on(shade[0], color, self._theme)} on {color}"
        if marked:
            return "bold reverse"
        if self.heatmap.scale.kinds:
            return self._hue(row, column)
        color, strength = "red" if shade[0] == "m" else "green", shade[1]
        return "dim" if strength < 0.1 else "" if strength < 0.4 else color if strength < 0.75 else f"bold {color}"

    def _hue(self, row: int, column: int) -> str:
        shade = self.heatmap.shade(row, column)
        return _HUES[shade[0]] if shade else ""

    def legend(self) -> RenderableType:
        """The description of the values, and the scale between the labels of its ends."""
        scale = self.heatmap.scale
        if scale.kinds:
            return self._kinds()
        (low, high), labels = scale.ends(self.heatmap.values), scale.labels(self.heatmap.values)
        line = Text(style="dim")
        line.append(f"{scale.legend}: " if scale.legend else "")
        line.append(f"{labels[0]} ")
        if low < 0:
            line.append_text(self._scale("m", self._negative, reverse=True))
            line.append(" 0 " if high > 0 else "")
        if high > 0 or low >= 0:
            line.append_text(self._scale("p" if scale.signed else "v", self._positive))
        line.append(f" {labels[1]}")
        return line

    def _scale(self, name: str, characters: str, *, reverse: bool = False) -> Text:
        if not self.truecolor:
            return Text(characters[:0:-1] if reverse else characters[1:])
        steps = [round(i * (colors.STEPS - 1) / (_SCALE - 1)) for i in range(_SCALE)]
        scale = Text()
        for step in reversed(steps) if reverse else steps:
            scale.append(self._block, style=f"not dim {self._scales[name][step]}")
        return scale

    def _kinds(self) -> RenderableType:
        """The letter and the name of each kind, and the meaning of the color's strength."""
        items = []
        for kind in self.heatmap.scale.kinds:
            color = self._scales[kind.hue][-1]
            style = f"{colors.ink_on(kind.hue, color, self._theme)} on {color}"
            letter = (f" {kind.letter} ", style) if self.truecolor else (kind.letter, _HUES[kind.hue])
            items.append(Text.assemble(letter, (f" {kind.name}", "dim")))
        strength = f"strength: {self.heatmap.scale.legend}" if self.heatmap.scale.legend else ""
        return Columns([*items, Text(strength, style="dim")], padding=(0, 2))
