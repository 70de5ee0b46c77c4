"""Views that grow on the terminal while they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import RenderableType
from rich.text import Text

from llama_scratch.render import to_terminal
from llama_scratch.render.page import Page
from llama_scratch.render.progress import live_display
from llama_scratch.repl.session import Session
from llama_scratch.system.progress import Progress

# Rows reserved for the title, the labels and the lines around the page. A display taller than the screen cannot be
# erased.
_ROWS_AROUND = 13
# Progress toward a total of at least this value, such as a number of tensors, is displayed as a percentage.
_COUNTED = 100
# Draws the page of the results so far, given a progress message and the number of rows available.
Draw = Callable[[str, int], Page]


@contextmanager
def growing_view(session: Session) -> Iterator[tuple[Progress, Callable[[Draw], None]]]:
    """Display a partial page and its progress until the block ends.

    This needs a terminal with enough rows. Otherwise, or with --plain, at most a progress bar is displayed.

    Yields:
        The progress callback, and a function that sets how to draw the results so far.
    """
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
        share = f" {done:,} of {total:,}" if total < _COUNTED else f": {100 * done / total:.0f} %"
        said = stage.capitalize() + share

    def show(draw: Draw) -> None:
        nonlocal page
        page = draw

    def view() -> RenderableType:
        return to_terminal.view(page(said, console.height - _ROWS_AROUND)) if page else Text(" " + said)

    with live_display(Live(get_renderable=view, console=console, refresh_per_second=8, transient=True)):
        yield report, show
