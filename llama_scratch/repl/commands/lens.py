"""/lens: the logit lens, drawn while it is computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import RenderableType
from rich.text import Text

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render import to_terminal
from llama_scratch.render.page import Page
from llama_scratch.render.pages import lens as lens_pages
from llama_scratch.render.progress import live_display
from llama_scratch.repl.commands.arguments import window_start
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session
from llama_scratch.system.progress import Progress

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Interpretability")

_LENS = re.compile(r"(ranks)?(?:\s*\b([0-9]{1,9}))?")
# Rows reserved for the page's title, labels and surrounding lines. A display taller than the screen cannot be erased.
_ROWS_AROUND = 13
# Draws the page of the results so far, given a progress message and the number of rows available.
Draw = Callable[[str, int], Page]


@contextmanager
def _watched(session: Session) -> Iterator[tuple[Progress, Callable[[Draw], None]]]:
    """Provide callbacks for progress and for the partial page, displayed on a terminal until the block ends."""
    console = session.screen.console
    watched = session.screen.interactive and console.file.isatty() and not console.is_dumb_terminal
    if not watched or session.settings.plain or console.height <= _ROWS_AROUND:
        with session.screen.progress() as progress:
            yield progress, lambda draw: None
        return
    # Imported here because other commands and prompts do not need it.
    from rich.live import Live

    said, page = "", None

    def report(stage: str, done: int, total: int) -> None:
        nonlocal said
        said = f"{stage.capitalize()} {done:,} of {total:,}"

    def show(draw: Draw) -> None:
        nonlocal page
        page = draw

    def view() -> RenderableType:
        return to_terminal.view(page(said, console.height - _ROWS_AROUND)) if page else Text(" " + said)

    with live_display(Live(get_renderable=view, console=console, refresh_per_second=8, transient=True)):
        yield report, show


@command("lens", "[ranks] [POSITION]", complete=lambda _session, _begun: ["ranks"])
def _lens(session: Session, argument: str) -> Reply:
    """Logit lens: the prediction after each layer.

    Shows the most probable token at each layer and position, shaded by its probability. A narrow screen shows the last
    positions, or those from POSITION (counted from 0). With ranks: the rank of the final prediction at each layer.

    The residual stream after each layer goes through the final norm and the unembedding.
    """
    from llama_scratch.microscope.lens import LENS_POSITIONS, growing

    matched = _LENS.fullmatch(argument)
    if matched is None:
        raise UsageError(
            f"Invalid argument '{sanitize(argument)}' for /lens. Give a position such as 0, or ranks, or both."
        )
    llama, ids, ranks = session.llama, session.ids, bool(matched[1])
    position = int(matched[2]) if matched[2] else None
    first = window_start(position, len(ids), LENS_POSITIONS)
    with _watched(session) as (progress, show):
        for grid in growing(llama, ids, first, progress=progress):
            show(partial(lens_pages.growing, grid, ranks=ranks))
    return paged(session, grid.as_json(), lens_pages.page(grid, position, ranks=ranks))
