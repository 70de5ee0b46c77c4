"""Save, edit and replay session files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from llama_scratch.errors import UsageError
from llama_scratch.llama import Llama
from llama_scratch.repl import session_file
from llama_scratch.repl.dispatch import respond
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.replay import Report, run_again
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Settings
from llama_scratch.sampling import Sampling
from llama_scratch.system.progress import Progress


def other_model(_source: str, _precision: str, _progress: Progress) -> Llama:
    raise UsageError("There is no other model here.")


def session_of(llama: Llama, *lines: str, interactive: bool = False, **settings: Any) -> Session:
    """Create a session and enter some lines.

    Args:
        llama: The model.
        lines: Prompts and commands.
        interactive: Whether the session behaves as on a terminal.
        settings: Settings to change.
    """
    session = Session(
        Loading.ended_with(llama),
        Console(file=io.StringIO(), width=60),
        replace(Settings(5, 0, Sampling()), **settings),
        other_model,
        interactive=interactive,
    )
    for line in lines:
        respond(session, line)
    return session


def saved(session: Session, path: Path) -> Path:
    """Save a session and return the path."""
    respond(session, f"/save {path}")
    return path


def replayed(path: Path, llama: Llama) -> Report:
    """Replay a session file and return the report."""
    return run_again(session_file.load(path), llama, other_model, Console(file=io.StringIO()))


def edited(path: Path, change: Callable[[list[Any]], object]) -> Path:
    """Edit the lines of a session file as JSON values, and return the path."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
