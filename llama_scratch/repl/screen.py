"""The screen of a session: prints views and records them for /export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.text import Text

from llama_scratch.render import text
from llama_scratch.render.progress import progress_bar
from llama_scratch.system.progress import Progress

if TYPE_CHECKING:
    from llama_scratch.repl.keyboard import Keyboard


@dataclass
class SessionScreen:
    """The console of a session, with a record of the printed views.

    Args:
        console: The console that the session prints to.
        interactive: Whether the session runs on a terminal. If so, it shows progress and streams text.
        records_turns: Whether to record views and turns. Only commands such as /save and /export need them.
        keyboard: The keyboard, unless lines come from a pipe.
        views: The typed lines and printed views, for /export.
        explained: The causes of the warnings shown so far.
    """

    console: Console
    interactive: bool = False
    records_turns: bool = True
    keyboard: Keyboard | None = None
    views: list[RenderableType] = field(default_factory=list)
    explained: set[str] = field(default_factory=set)

    def show(self, view: RenderableType) -> None:
        """Print a view and record it for /export."""
        self.record_view(view)
        self.console.print(view, markup=False, highlight=False)

    def record_view(self, view: RenderableType) -> None:
        """Record a view for /export without printing it."""
        if self.records_turns:
            self.views.append(view)

    def echo(self, model_name: str, line: str) -> None:
        """Record a typed line for /export.

        Args:
            model_name: The model's name, shown as the prompt.
            line: The line.
        """
        self.record_view(Text.assemble((model_name, "bold cyan"), "> ", text.readable(line)))

    def clear(self) -> None:
        """Discard the views and, if interactive, clear the screen."""
        self.views = []
        if self.interactive:
            self.console.clear()

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Provide a progress callback, shown as a progress bar on a terminal."""
        with progress_bar(self.console) as progress:
            yield progress
