"""/history: the lines typed before."""

from __future__ import annotations

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from llama_scratch.render import text
from llama_scratch.repl.commands.arguments import whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under
from llama_scratch.repl.session import Session

command = commands_under("Session")


@command("history", "[N]", replayed=False)
def _history(session: Session, argument: str) -> Reply:
    """Show the last N lines typed (default 20), newest last.

    On a terminal, includes the lines of earlier sessions.
    """
    count = whole_number(argument, "/history") if argument else 20
    typed = _earlier_lines() if session.screen.keyboard else []
    typed = (typed or [turn.input for turn in session.state.turns if turn.input])[-count:]
    return Reply(
        {"history": typed},
        Group(*(Padding(Text(text.readable(line)), (0, 0, 0, 1), expand=False) for line in typed)),
    )


def _earlier_lines() -> list[str]:
    """Return the lines of the history file, oldest first; empty if it cannot be read."""
    from llama_scratch.repl.history import FileHistory, history_path

    try:
        return list(FileHistory(history_path()).load_history_strings())[::-1]
    except OSError:
        return []
