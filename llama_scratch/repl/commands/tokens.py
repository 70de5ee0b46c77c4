"""How a text is cut into tokens."""

from __future__ import annotations

from llama_scratch.render.pages import tokens as pages
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("Looking at it")


@command("tokens", "[TEXT]")
def _tokens(session: Session, argument: str) -> Reply:
    """How the text is cut into tokens: ids and bytes."""
    from llama_scratch.microscope.tokens import tokens

    table = tokens(session.llama, session.ids_or_current(argument))
    return paged(session, table.as_json(), pages.page(table))
