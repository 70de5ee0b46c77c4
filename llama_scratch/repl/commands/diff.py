"""Where the predictions after two texts differ."""

from __future__ import annotations

from llama_scratch.render.pages import diff as pages
from llama_scratch.repl.commands.arguments import two_texts
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("Looking at it")


@command("diff", "A | B")
def _diff(session: Session, argument: str) -> Reply:
    """Where the predictions after two texts part, and how far.

    The divergence (Jensen–Shannon) is 0 bits for equal predictions and 1 bit for those with nothing in common.
    A text in double quotes is read as JSON.
    """
    from llama_scratch.microscope.diff import diff

    first, second = map(session.encode, two_texts(argument, "/diff"))
    llama = session.llama
    with session.screen.progress() as progress:
        difference = diff(llama, first, second, session.settings.top, progress)
    return paged(session, difference.as_json(), pages.page(difference))
