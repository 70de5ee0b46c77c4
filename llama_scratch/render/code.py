"""Syntax highlighting of source code.

A file is lexed once, and excerpts are slices of the result. An excerpt that is lexed alone gets wrong colors if it
begins inside a docstring.
"""

from __future__ import annotations

from functools import lru_cache

from rich.syntax import Syntax
from rich.text import Text

from llama_scratch.render.page import Code, written


def highlighted(part: Code) -> list[Text]:
    """Return the lines of an excerpt, colored as in their file."""
    excerpt = part.text.splitlines()
    lines = _lexed(part.file or part.text, part.language)
    if part.file:
        lines = lines[part.first - 1 : part.first - 1 + len(excerpt)]
    # An excerpt is indented less than its file: cut each line at its beginning.
    return [line[len(line) - len(written(text)) :] for line, text in zip(lines, excerpt, strict=True)]


class Excerpt(Syntax):
    """An excerpt on a terminal, with line numbers."""

    def __init__(self, part: Code):
        super().__init__(
            "\n".join(map(written, part.text.splitlines())),
            part.language,
            theme="ansi_dark",
            background_color="default",
            line_numbers=True,
            start_line=part.first,
            highlight_lines={part.first + line - 1 for line in part.marked},
            word_wrap=True,
        )
        self._part = part

    def highlight(self, code: str, line_range: tuple[int | None, int | None] | None = None) -> Text:
        """Return the excerpt's colored lines.

        Args:
            code: Ignored, because the lines are already lexed.
            line_range: Ignored.
        """
        return Text("\n", no_wrap=False).join(highlighted(self._part)).append("\n")


@lru_cache(maxsize=8)
def _lexed(text: str, language: str) -> tuple[Text, ...]:
    lines = text.splitlines()
    whole = Syntax("", language, theme="ansi_dark").highlight("\n".join(map(written, lines)))
    return tuple(whole.split("\n", allow_blank=True)[: len(lines)])
