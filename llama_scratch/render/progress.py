"""A bar for what takes long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console

from llama_scratch.system.progress import Progress, silent


class DeferInterrupts:
    """A stretch of code that an interrupt has to wait for; it is raised at the end.

    `on`: whether one is being run. `waiting`: whether an interrupt came; set by whoever handles them.
    """

    def __init__(self) -> None:
        self.on = False
        self.waiting = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False
        if self.waiting:
            self.waiting = False
            raise KeyboardInterrupt


defer_interrupts = DeferInterrupts()


class Display(Protocol):
    """What rich shows in one place and changes there."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


@contextmanager
def live_display(display: Display) -> Iterator[None]:
    """In here it is on the screen.

    Half put there or half taken away it would stay on the console, and no other one would show.
    """
    try:
        with defer_interrupts:
            display.start()
        yield
    finally:
        with defer_interrupts:
            display.stop()


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
    bar = Bar(*columns, console=console, transient=True)
    with live_display(bar):
        task = bar.add_task(start or "", total=None, visible=start is not None)

        def report(stage: str, done: int, total: int) -> None:
            # Without a total the bar goes to and fro.
            bar.update(task, description=stage.capitalize(), completed=done, total=total or None, visible=True)

        yield report
