"""/surprisal: the surprisal of each token of a text."""

from __future__ import annotations

from llama_scratch.render.pages import surprisal as pages
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Predictions")


@command("surprisal", "[TEXT]")
def _surprisal(session: Session, argument: str) -> Reply:
    """Surprisal of each token of the text, in bits.

    A token with probability 1/2 has 1 bit, one with 1/4 has 2. Perplexity is 2 to the power of the mean surprisal.
    """
    from llama_scratch.microscope.surprisal import per_character, surprisal

    llama, ids = session.llama, session.ids_or_current(argument)
    with session.screen.progress() as progress:
        scored = surprisal(llama, ids, session.settings.top, progress)
    text, bits = session.text_of(ids), per_character(llama, scored.tokens)
    return paged(session, scored.as_json(), pages.page(scored, text, bits))
