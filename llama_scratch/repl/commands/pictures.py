"""/picture: the last view as a picture or web page."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from llama_scratch.errors import LlamaScratchError, UsageError, sanitize
from llama_scratch.render.page import Page
from llama_scratch.repl.commands.arguments import file_path, paths
from llama_scratch.repl.commands.registry import Reply, commands_under, note
from llama_scratch.repl.session import Session
from llama_scratch.repl.user_files import write_whole

command = commands_under("Session")


@command("picture", "FILE.png | FILE.html", complete=paths, replayed=False)
def _picture(session: Session, argument: str) -> Reply:
    """Save the last view as a picture or web page.

    FILE.html works offline and shows values under the pointer. FILE.png needs matplotlib.
    """
    path = file_path(argument)
    draw = drawer(path, argument, "/picture", (".png", ".html"))
    if (page := _last(session)) is None:
        raise UsageError("There is nothing to draw yet. Enter a prompt or a command such as /lens first.")
    write_whole(path, draw(page))
    return note(f"Drew '{page.headline}' to {sanitize(path, 200)}.", path=str(path), title=page.title)


def drawer(path: Path, argument: str, command: str, endings: Sequence[str]) -> Callable[[Page], bytes]:
    """Return the function that draws a page in a file's format.

    Args:
        path: The file.
        argument: The command's argument, for the error.
        command: Name of the command, for the error.
        endings: The supported file name endings.

    Returns:
        The drawing function.

    Raises:
        UsageError: If the file name has a different ending.
        LlamaScratchError: If the file exists.
    """
    ending = path.suffix.lower()
    if ending not in endings:
        raise UsageError(f"Invalid file name '{sanitize(argument)}' for {command}. End it in {' or '.join(endings)}.")
    if os.path.lexists(path):
        raise LlamaScratchError(f"{sanitize(path, 200)} already exists. Choose another name.")
    return _DRAWERS[ending]


def _last(session: Session) -> Page | None:
    """Return the last view, or the last answer if it came after the last view."""
    if session.state.page is not None or session.now is None:
        return session.state.page
    from llama_scratch.render.pages import answer

    return answer.page(session.now.prediction)


# The renderers are imported when they are called, to keep the session's start fast.


def _png(page: Page) -> bytes:
    from llama_scratch.render.to_png import png

    return png(page)


def _html(page: Page) -> bytes:
    from llama_scratch.render.to_html import html

    return html(page).encode()


_DRAWERS: dict[str, Callable[[Page], bytes]] = {".png": _png, ".html": _html}
