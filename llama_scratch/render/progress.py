"""Progress bars for long-running work. An interrupt cannot leave a bar half drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console

from llama_scratch.system.progress import Progress, silent


class DeferInterrupts:
    """A context manager that defers an interrupt until the end of its block.

    Attributes:
        on: Whether the block is running.
        waiting: Whether an interrupt is pending. The signal handler sets it.
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
    """A live display of rich, such as a progress bar."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


@contextmanager
def live_display(display: Display) -> Iterator[None]:
    """Show a display during the block.

    Interrupts are deferred while it starts and stops. A display that is only half removed would stay registered with
    the console, and no other display could start.
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
    """Show a progress bar during the block, and yield the callback that updates it.

    The bar is removed at the end. It is not shown at all if the console is quiet or not a terminal.

    Args:
        console: The console for the bar.
        start: First stage, shown immediately. None: the bar appears with the first report.
    """
    if console.quiet or not console.file.isatty() or console.is_dumb_terminal:
        yield silent
        return
    # Deferred, because prompts and answers without a bar should not wait for the import.
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn())
    bar = Bar(*columns, console=console, transient=True)
    with live_display(bar):
        task = bar.add_task(start or "", total=None, visible=start is not None)

        def report(stage: str, done: int, total: int) -> None:
            # Without a total the bar pulses.
            bar.update(task, description=stage.capitalize(), completed=done, total=total or None, visible=True)

        yield report
