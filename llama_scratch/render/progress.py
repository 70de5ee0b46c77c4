"""A bar for what takes long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from llama_scratch.progress import Progress, silent


@contextmanager
def progress_bar(console: Console, start: str | None = None) -> Iterator[Progress]:
    """Yields the `Progress` to report to.

    The bar is gone afterwards, and never there where nobody watches. It begins with the stage `start`,
    or, without one, appears with the first call.
    """
    if console.quiet or not console.file.isatty() or console.is_dumb_terminal:
        yield silent
        return
    # Imported here, so that a prompt or an answer which needs no bar does not wait for it.
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(start or "", total=None, visible=start is not None)

        def report(stage: str, done: int, total: int) -> None:
            # Without a total the bar goes to and fro.
            bar.update(task, description=stage.capitalize(), completed=done, total=total or None, visible=True)

        yield report
