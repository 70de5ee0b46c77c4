"""Words for a terminal: visible tokens, running text, numbers, and sentences in their styles."""

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
    r"""A token's text with nothing in it that a terminal would hide or obey: " a\n" → ␣a\n.

    Spaces become ␣, control and invisible characters their escapes, and a combining mark that stands
    first gets a circle to sit on.
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
    """Running text for a terminal: line breaks and tabs stay, every other control character becomes its escape."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else repr(char)[1:-1] for char in text
    )


class Wrapped:
    """Running text that comes piece by piece, wrapped on the terminal while it is written.

    A character is written as soon as it is complete. If its word turns out to be too long for the line, the word
    is erased there and written again on the next line.

    Args:
        width: Cells per line.
        begin: Text that is on the first line already.
        indent: Text at the beginning of each further line.
    """

    def __init__(self, width: int, begin: str = "", indent: str = ""):
        self._width = width
        self._indent = indent
        self._done = ""  # the lines before this one
        self._start(begin)
        self._incomplete = ""

    @property
    def text(self) -> str:
        """All lines as they are on the screen."""
        return self._done + "".join(self._line)

    def push(self, text: str, *, final: bool = False) -> list[Text | Control]:
        """Take the next piece of the text; `final` if it is the last. Returns what to print, without line ends."""
        characters = list(iter_graphemes(self._incomplete + text))
        # More may belong to the last character, such as a skin tone. A mark on a letter takes no cell, so that can come
        # later.
        self._incomplete = "" if final or not characters or characters[-1].isascii() else characters.pop()
        return [written for character in characters for written in self._add(character)]

    def resize(self, width: int) -> list[Text | Control]:
        """Go on in another width. Returns what to print for that."""
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
        return [Text(character)] if fits else []  # white space over the edge is not seen

    def _wrap(self, character: str) -> list[Text | Control]:
        """Begin the next line with a character, and with the part of its word that is on this line."""
        line = [*self._line, character]
        at = next((i for i in range(len(line) - 1, self._fixed, -1) if _may_break(line[i - 1], line[i])), len(line) - 1)
        word = line[at:]
        if cells(self._indent) + sum(map(cells, word)) > self._width:  # it has to be cut anyway
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
    """Whether a line can end between two characters: after a space and beside East Asian characters and emoji.

    Closing punctuation, hyphens and marks such as ー do not begin a line there, and opening brackets do not end one.
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
    """A probability as a person reads it; never 0 or 100 for what is not."""
    if 0 < probability < 0.0005:
        return "<0.1 %"
    if 0.9995 <= probability < 1:
        return ">99.9 %"
    return f"{100 * probability:.1f} %"


def warning(sentence: str) -> RenderableType:
    """A sentence that explains something about the prompt."""
    return indented(sentence, "yellow")


def note(sentence: str) -> RenderableType:
    """A sentence about an answer, or about the thing that was done."""
    return indented(sentence, "dim")


def error(sentence: str) -> RenderableType:
    """A sentence that says what went wrong."""
    return indented(escape_controls(user_message(sentence)), "red")


def indented(sentence: str, style: str) -> RenderableType:
    """A sentence in a style, a cell from the edge."""
    return Padding(Text(sentence, style=style), (0, 0, 0, 1), expand=False)


def counted(n: int, noun: str) -> str:
    """A number with its noun: 1 token, 2,000 tokens."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def size(count: int, decimals: int = 0) -> str:
    """Bytes as a person reads them; megabytes with so many decimals.

    >>> size(2_471_645_608), size(98_362_432)
    ('2.47 GB', '98 MB')
    """
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.{decimals}f} MB"


def as_text(view: RenderableType, width: int = 100) -> str:
    """A view as lines without colors; a text as it is."""
    if isinstance(view, Text):
        return view.plain
    console = Console(no_color=True, color_system=None, highlight=False, width=width, emoji=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(view, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
