"""/export: the screen as a web page, picture or text."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable

from rich.console import Console

from llama_scratch.errors import LlamaScratchError, UsageError, sanitize
from llama_scratch.render.lines import json_line
from llama_scratch.render.screen import screen_html, screen_svg
from llama_scratch.repl.commands.arguments import file_path, paths
from llama_scratch.repl.commands.registry import Reply, commands_under, note
from llama_scratch.repl.session import Session
from llama_scratch.repl.user_files import write_whole
from llama_scratch.tokenizer import replace_surrogates

command = commands_under("Session")


@command("export", "FILE.html | .svg | .md | .json", complete=paths, replayed=False)
def _export(session: Session, argument: str) -> Reply:
    """Export the screen as a web page, picture or text.

    FILE.html, .svg or .md contains the screen; FILE.json contains the lines and their answers.
    """
    path = file_path(argument)
    write = _EXPORTS.get(path.suffix.lower())
    if write is None:
        raise UsageError(
            f"Invalid file name '{sanitize(argument)}' for /export. End it in one of {', '.join(_EXPORTS)}."
        )
    if not session.state.turns or not (session.screen.views or path.suffix.lower() == ".json"):
        raise UsageError("There is nothing to export yet. Enter a prompt or a command first.")
    if os.path.lexists(path):
        raise LlamaScratchError(f"{sanitize(path, 200)} already exists. Choose another name.")
    write_whole(path, replace_surrogates(write(session)).encode())
    return note(f"Exported to {sanitize(path, 200)}.", path=str(path))


def _drawn(session: Session) -> Console:
    """Print the session's views again to a recording console."""
    width = session.screen.console.width
    console = Console(record=True, file=io.StringIO(), width=width, emoji=False)
    for view in session.screen.views:
        console.print(view, markup=False, highlight=False)
    return console


def _markdown(session: Session) -> str:
    text = "\n".join(line.rstrip() for line in _drawn(session).export_text().splitlines())
    # A longer fence than any run of backticks in the text, so the text cannot end the block.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"


def _title(session: Session) -> str:
    return f"llama-scratch: {session.state.loading.name}"


_EXPORTS: dict[str, Callable[[Session], str]] = {
    ".html": lambda session: screen_html(_drawn(session), _title(session)),
    ".svg": lambda session: screen_svg(_drawn(session), _title(session)),
    ".md": _markdown,
    ".json": lambda session: json_line([vars(turn) for turn in session.state.turns]) + "\n",
}
