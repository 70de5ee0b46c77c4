"""The screen of a session: what is printed on it, and what /export writes of it."""

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
    """The console of a session, with a record of its contents.

    Args:
        console: Where the session prints.
        interactive: Whether a user watches, so that progress and text in parts are shown as they come.
        records_turns: Whether views and turns are remembered. Without commands nothing asks for them.
        keyboard: The keyboard on which the lines are typed; None if they come from a pipe.
        views: What was typed and printed, for /export.
        explained: The causes of the warnings that this screen has explained.
    """

    console: Console
    interactive: bool = False
    records_turns: bool = True
    keyboard: Keyboard | None = None
    views: list[RenderableType] = field(default_factory=list)
    explained: set[str] = field(default_factory=set)

    def show(self, view: RenderableType) -> None:
        """Print a view and let /export write it."""
        self.record_view(view)
        self.console.print(view, markup=False, highlight=False)

    def record_view(self, view: RenderableType) -> None:
        """Let /export write something that was printed elsewhere."""
        if self.records_turns:
            self.views.append(view)

    def echo(self, model_name: str, line: str) -> None:
        """Let /export write a line that was typed after the prompt of a model."""
        self.record_view(Text.assemble((model_name, "bold cyan"), "> ", text.readable(line)))

    def clear(self) -> None:
        """Forget the views, and empty the screen if a user watches it."""
        self.views = []
        if self.interactive:
            self.console.clear()

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A progress callback, shown as a bar if a user watches."""
        with progress_bar(self.console) as progress:
            yield progress
