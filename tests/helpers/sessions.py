"""Sessions without a terminal, and the results and views of their commands."""

from __future__ import annotations

import io
import json
from typing import Any

from rich.console import Console, RenderableType

from llama_scratch.errors import LlamaScratchError
from llama_scratch.llama import Llama
from llama_scratch.repl.commands import run_command
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Settings
from llama_scratch.sampling import GREEDY
from llama_scratch.system.progress import Progress


def started(llama: Llama) -> Session:
    """Create a session without a text, with an invisible console."""

    def open(source: str, precision: str, progress: Progress) -> Llama:
        return Llama.load(source, precision=precision, device="cpu", progress=progress)

    console = Console(file=io.StringIO(), width=80)
    return Session(loading=Loading.ended_with(llama), console=console, settings=Settings(5, 0, GREEDY), open=open)


def run(session: Session, line: str) -> dict[str, Any]:
    """Run a command and return its JSON facts.

    Also checks that its view can be printed and is not empty.
    """
    reply = run_command(session, line)[1]
    assert reply is not None
    assert reply.view is not None
    assert shown(reply.view, 80).strip()
    facts: dict[str, Any] = json.loads(json.dumps(reply.facts, allow_nan=False))
    return facts


def shown(view: RenderableType, width: int, **how: Any) -> str:
    """Render a view as text.

    Args:
        view: The view.
        width: Width of the terminal.
        how: More options of the console.
    """
    console = Console(file=io.StringIO(), width=width, **how)
    with console.capture() as captured:
        console.print(view, markup=False, highlight=False)
    return captured.get()


def assert_sentence(error: LlamaScratchError) -> None:
    """Check that the message of an error ends with a period."""
    assert str(error).endswith(".")
