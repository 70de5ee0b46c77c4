"""Dispatch typed lines: run commands, answer prompts, accept offered tokens."""

from __future__ import annotations

from typing import Any

from llama_scratch.repl.answering import extend, say
from llama_scratch.repl.commands import Reply, is_command, run_command, unescaped
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Turn
from llama_scratch.results import merged


def respond(session: Session, line: str) -> tuple[dict[str, Any], Reply | None]:
    """Run a command or answer a prompt, and record the turn.

    An empty line accepts the offered tokens.

    Args:
        session: The session.
        line: The typed line.

    Returns:
        The JSON object of the answer and, for a command, its reply.
    """
    reply = None
    if is_command(line):
        command, reply = run_command(session, line)
        output = merged({"command": command.name}, reply.facts if reply else {})
    elif line:
        output = say(session, unescaped(line))
    else:
        output = extend(session, session.state.offered)
    session.record(Turn(line, output))
    return output, reply
