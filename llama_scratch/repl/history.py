"""What was typed in this and earlier sessions, written line by line as it is sent."""

from __future__ import annotations

import contextlib
from pathlib import Path

from platformdirs import user_state_path
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from llama_scratch.render import terminal
from llama_scratch.repl.session import Session
from llama_scratch.tokenizer import replace_surrogates


def history_path() -> Path:
    """Where the history is kept."""
    return user_state_path("llama-scratch", appauthor=False) / "history"


def open_history(session: Session) -> History:
    """The history file, for oneself alone; where it cannot be kept the session says so and goes on without."""
    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        _ = path.read_bytes()
    except OSError as error:
        session.console.print(
            terminal.warning(f"The history cannot be kept in {path} ({error.strerror}), so it ends with this session.")
        )
        return InMemoryHistory()
    return _History(str(path))


class _History(FileHistory):
    """A line that a terminal pasted with broken characters is kept in whole ones.

    A file that cannot be written any more ends the keeping, not the session: the lines stay in memory.
    """

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(replace_surrogates(string))
