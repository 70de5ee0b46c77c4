"""How surprising each token of a text is."""

from __future__ import annotations

from llama_scratch.render.pages import surprisal as pages
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("Looking at it")


@command("surprisal", "[TEXT]")
def _surprisal(session: Session, argument: str) -> Reply:
    """How much each token of the text surprised the model, in bits.

    A token of probability 1/2 has 1 bit, one of 1/4 has 2. The perplexity is 2 to their mean.
    """
    from llama_scratch.microscope.surprisal import per_character, surprisal

    llama, ids = session.llama, session.ids_or_current(argument)
    with session.screen.progress() as progress:
        scored = surprisal(llama, ids, session.settings.top, progress)
    text, bits = session.text_of(ids), per_character(llama, scored.tokens)
    return paged(session, scored.as_json(), pages.page(scored, text, bits))
