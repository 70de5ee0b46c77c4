"""Text for a terminal: visible tokens, running text, numbers, and styled messages."""

from __future__ import annotations

import unicodedata

from rich.console import Console, RenderableType
from rich.control import Control
from rich.padding import Padding
from rich.segment import ControlType
from rich.text import Text
from wcwidth import iter_graphemes
from wcwidth import width as cells

from llama_scratch.errors import escape_controls
from llama_scratch.render.messages import user_message

SPACE = "␣"


def visible(text: str, style: str = "") -> Text:
    r"""Make white space and control characters of a token visible: " a\n" → ␣a\n.

    Spaces become ␣. Control and invisible characters become escapes. A combining mark at the beginning gets a dotted
    circle as its base character.

    Args:
        text: The token's text.
        style: A style of rich.
    """
    visible_text = Text(style=style)
    for i, char in enumerate(text):
        kind = unicodedata.category(char)
        if char == " ":
            visible_text.append(SPACE, style="dim")
        elif kind[0] in "CZ":
            visible_text.append(char.encode("unicode_escape").decode(), style="dim")
        elif kind[0] == "M" and i == 0:
            visible_text.append("◌" + char)
        else:
            visible_text.append(char)
    return visible_text or Text("(empty)", style="dim")


def readable(text: str) -> str:
    """Escape the control characters of running text, except line breaks and tabs."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else repr(char)[1:-1] for char in text
    )


class Wrapped:
    """Word wrap for streamed text.

    A character is printed as soon as it is complete. If its word turns out to be too long for the line, the word is
    erased and printed again on the next line.

    Args:
        width: Cells per line.
        begin: Text that is already on the first line.
        indent: Indentation of the other lines.
    """

    def __init__(self, width: int, begin: str = "", indent: str = ""):
        self._width = width
        self._indent = indent
        self._done = ""  # the lines before the current one
        self._start(begin)
        self._incomplete = ""

    @property
    def text(self) -> str:
        """All lines, as they are on the screen."""
        return self._done + "".join(self._line)

    def push(self, text: str, *, final: bool = False) -> list[Text | Control]:
        """Add the next piece of the text.

        Args:
            text: The piece.
            final: Whether it is the last one.

        Returns:
            The text and control codes to print, without an additional line end.
        """
        characters = list(iter_graphemes(self._incomplete + text))
        # The last character may continue, for example with a skin tone. An ASCII letter is not held back: a combining
        # mark takes no cell, so it can be printed later.
        self._incomplete = "" if final or not characters or characters[-1].isascii() else characters.pop()
        return [written for character in characters for written in self._add(character)]

    def resize(self, width: int) -> list[Text | Control]:
        """Continue with another width. Returns the text to print for that, if any."""
        self._width = width
        return self._break() if self._column > width else []

    def _start(self, text: str) -> None:
        self._line = list(iter_graphemes(text))
        self._column = cells(text)
        self._fixed = len(self._line)  # characters that stay on this line

    def _add(self, character: str) -> list[Text | Control]:
        if character == "\n":
            return self._break()
        if character == "\t":
            character = " " * (8 - self._column % 8)
        fits = self._column + cells(character) <= self._width or len(self._line) == self._fixed
        if not fits and not character.isspace():
            return self._wrap(character)
        self._line.append(character)
        self._column += cells(character)
        return [Text(character)] if fits else []  # white space beyond the edge is invisible

    def _wrap(self, character: str) -> list[Text | Control]:
        """Wrap a character to the next line, with the part of its word on this line."""
        line = [*self._line, character]
        at = next((i for i in range(len(line) - 1, self._fixed, -1) if _may_break(line[i - 1], line[i])), len(line) - 1)
        word = line[at:]
        if cells(self._indent) + sum(map(cells, word)) > self._width:  # it does not fit on any line
            word = [character]
        erase: list[Text | Control] = []
        if len(word) > 1:
            del self._line[1 - len(word) :]
            erase = [Control.move_to_column(sum(map(cells, self._line))), _ERASE_TO_END]
        return [*erase, *self._break(), *(written for each in word for written in self._add(each))]

    def _break(self) -> list[Text | Control]:
        self._done += "".join(self._line).rstrip() + "\n"
        self._start(self._indent)
        return [Text("\n" + self._indent)]


_ERASE_TO_END = Control((ControlType.ERASE_IN_LINE, 0))


def _may_break(before: str, after: str) -> bool:
    """Whether a line may break between two characters.

    It may break after a space, and next to East Asian characters and emoji. In the latter case, no line begins with
    closing punctuation, a hyphen or a mark such as ー, and no line ends with an opening bracket.
    """
    if after.isspace() or before in "\N{NO-BREAK SPACE}\N{FIGURE SPACE}\N{NARROW NO-BREAK SPACE}":
        return False
    if before.isspace():
        return True
    if not any(unicodedata.east_asian_width(character[0]) in "WFH" for character in (before, after)):
        return False
    opening, closing = ("Ps", "Pi", "Sc"), ("Pe", "Pf", "Po", "Pd", "Lm")
    return unicodedata.category(before[0]) not in opening and unicodedata.category(after[0]) not in closing


def percent(probability: float) -> str:
    """Format a probability as a percentage. Only exact values are shown as 0 or 100."""
    if 0 < probability < 0.0005:
        return "<0.1 %"
    if 0.9995 <= probability < 1:
        return ">99.9 %"
    return f"{100 * probability:.1f} %"


def figure(value: float) -> str:
    """Format a number: 3 significant digits, or an integer with commas from 1,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def changes(before: float, after: float) -> str:
    """Describe the change of a probability, such as "falls from 77.3 % to 14.1 %".

    Args:
        before: The probability before the change.
        after: The probability after it.
    """
    if percent(before) == percent(after):
        return f"stays at {percent(before)}"
    return f"{'falls' if after < before else 'rises'} from {percent(before)} to {percent(after)}"


def warning(sentence: str) -> RenderableType:
    """Render a warning about the prompt."""
    return indented(sentence, "yellow")


def note(sentence: str) -> RenderableType:
    """Render a note about an answer or an action."""
    return indented(sentence, "dim")


def error(sentence: str) -> RenderableType:
    """Render an error message."""
    return indented(escape_controls(user_message(sentence)), "red")


def indented(sentence: str, style: str) -> RenderableType:
    """Render a message, indented by one cell.

    Args:
        sentence: The message.
        style: A style of rich.
    """
    return Padding(Text(sentence, style=style), (0, 0, 0, 1), expand=False)


def counted(n: int, noun: str) -> str:
    """Format a number with its noun, such as "1 token" or "2,000 tokens".

    Args:
        n: The number.
        noun: The noun in the singular.
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def size(count: int, decimals: int = 0) -> str:
    """Format a number of bytes as GB or MB.

    Args:
        count: Number of bytes.
        decimals: Number of decimals for megabytes. Gigabytes always have two.

    >>> size(2_471_645_608), size(98_362_432)
    ('2.47 GB', '98 MB')
    """
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.{decimals}f} MB"


def as_text(view: RenderableType, width: int = 100) -> str:
    """Render a view as lines of text without colors.

    Args:
        view: The view. The characters of a `Text` are returned unchanged.
        width: Width in cells.
    """
    if isinstance(view, Text):
        return view.plain
    console = Console(no_color=True, color_system=None, highlight=False, width=width, emoji=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(view, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
