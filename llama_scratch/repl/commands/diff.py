"""/diff: the difference between the predictions after two texts."""

from __future__ import annotations

from llama_scratch.render.pages import diff as pages
from llama_scratch.repl.commands.arguments import two_texts
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Predictions")


@command("diff", "A | B")
def _diff(session: Session, argument: str) -> Reply:
    """Compare the predictions after two texts.

    The Jensen–Shannon divergence is 0 bits for equal distributions and 1 bit for disjoint ones. A text in double
    quotes is read as JSON.
    """
    from llama_scratch.microscope.diff import diff

    first, second = map(session.encode, two_texts(argument, "/diff"))
    llama = session.llama
    with session.screen.progress() as progress:
        difference = diff(llama, first, second, session.settings.top, progress)
    return paged(session, difference.as_json(), pages.page(difference))
