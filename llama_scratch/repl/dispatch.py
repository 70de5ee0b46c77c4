"""How one line of a session becomes an answer: a command, a prompt, or an empty line that accepts the offer."""

from __future__ import annotations

from typing import Any

from llama_scratch.repl.answering import extend, say
from llama_scratch.repl.commands import Reply, is_command, run_command, unescaped
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Turn


def respond(session: Session, line: str) -> tuple[dict[str, Any], Reply | None]:
    """Do what a line of a session says: the object that answers it and, of a command, its reply.

    An empty line accepts what is offered. The turn is kept in the session.
    """
    reply = None
    if is_command(line):
        command, reply = run_command(session, line)
        output = {"command": command.name} | (reply.facts if reply else {})
    elif line:
        output = say(session, unescaped(line))
    else:
        output = extend(session, session.state.offered)
    session.record(Turn(line, output))
    return output, reply
