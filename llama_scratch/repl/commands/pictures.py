"""The last view as a picture or a web page."""

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

command = commands_under("The session")


@command("picture", "FILE.png | FILE.html", complete=paths, replayed=False)
def _picture(session: Session, argument: str) -> Reply:
    """Draw the last view as a picture or a web page.

    FILE.html needs no network and shows values under the pointer; FILE.png is drawn by matplotlib.
    """
    path = file_path(argument)
    draw = drawer(path, argument, "/picture", (".png", ".html"))
    if (page := _last(session)) is None:
        raise UsageError("There is nothing to draw yet, expected a prompt or a view such as /lens before it.")
    write_whole(path, draw(page))
    return note(f"Drew '{page.headline}' to {sanitize(path, 200)}.", path=str(path), title=page.title)


def drawer(path: Path, argument: str, command: str, endings: Sequence[str]) -> Callable[[Page], bytes]:
    """What draws a page for a file of this name. Raises where it has none of these endings, or is taken."""
    ending = path.suffix.lower()
    if ending not in endings:
        raise UsageError(
            f"'{sanitize(argument)}' was given for {command}, expected a name that ends in {' or '.join(endings)}."
        )
    if os.path.lexists(path):
        raise LlamaScratchError(f"{sanitize(path, 200)} is there already, so it stays as it is; choose another name.")
    return _DRAWERS[ending]


def _last(session: Session) -> Page | None:
    """The view that was shown last, or the answer where there was none."""
    if session.state.page is not None or session.now is None:
        return session.state.page
    from llama_scratch.render.pages import answer

    return answer.page(session.now.prediction)


# Late imports: a session's start does not wait for them.


def _png(page: Page) -> bytes:
    from llama_scratch.render.to_png import png

    return png(page)


def _html(page: Page) -> bytes:
    from llama_scratch.render.to_html import html

    return html(page).encode()


_DRAWERS: dict[str, Callable[[Page], bytes]] = {".png": _png, ".html": _html}
