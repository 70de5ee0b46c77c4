"""/tokens: the tokenization of a text."""

from __future__ import annotations

from llama_scratch.render.pages import tokens as pages
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Predictions")


@command("tokens", "[TEXT]")
def _tokens(session: Session, argument: str) -> Reply:
    """Tokenization of the text: ids and bytes."""
    from llama_scratch.microscope.tokens import tokens

    table = tokens(session.llama, session.ids_or_current(argument))
    return paged(session, table.as_json(), pages.page(table))
