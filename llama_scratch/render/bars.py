"""Horizontal bars on a terminal, in eighths of a character (whole ones in ASCII)."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

_BLOCKS = " ▏▎▍▌▋▊▉█"


class Bar:
    """A horizontal bar for a probability, at most 40 cells wide."""

    def __init__(self, probability: float):
        self.probability = probability

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(_rightward(self.probability, min(options.max_width, 40), has_blocks(options)), style="cyan")


class TextWithBar:
    """A text followed by a bar.

    Args:
        text: The text.
        bar: Length of the bar, −1 to 1. None: no bar.
        both: Whether bars extend to either side of a center line.
    """

    def __init__(self, text: Text, bar: float | None, both: bool):
        self.text, self.bar, self.both = text, bar, both

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(
            min(self.text.cell_len + 6, options.max_width), min(self.text.cell_len + 42, options.max_width)
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = self.text.copy()
        if line.plain:
            line.append(" ")
        room = min(options.max_width - line.cell_len, 41)
        if self.bar is not None and room > 1:
            bar = max(-1.0, min(1.0, self.bar))
            blocks = has_blocks(options)
            if self.both:
                half = (room - 1) // 2
                line.append((_leftward(-bar, half, blocks) if bar < 0 else "").rjust(half), style="red")
                line.append("│" if blocks else "|", style="dim")
                line.append(_rightward(bar, half, blocks), style="cyan")
            else:
                line.append(_rightward(bar, room - 1, blocks), style="cyan")
        line.rstrip()
        line.no_wrap, line.overflow = True, "crop"
        yield line


def has_blocks(options: ConsoleOptions) -> bool:
    """Whether the terminal's encoding has block characters."""
    return options.encoding.startswith("utf")


def _rightward(share: float, width: int, blocks: bool) -> str:
    if not blocks:
        return "#" * round(width * max(0.0, share))
    eighths = round(8 * width * max(0.0, share))
    return ("█" * (eighths // 8) + _BLOCKS[eighths % 8]).rstrip()


def _leftward(share: float, width: int, blocks: bool) -> str:
    """Draw a bar from right to left, in half characters.

    Unicode has no right-aligned blocks for most eighths.
    """
    if not blocks:
        return "#" * round(width * share)
    halves = round(2 * width * share)
    half = "▐" if halves % 2 else ""
    return half + "█" * (halves // 2)
