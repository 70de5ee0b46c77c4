"""/choices: the probabilities of given continuations."""

from __future__ import annotations

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.pages import choices as pages
from llama_scratch.repl.commands.arguments import split_at_bars, unquoted
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Predictions")


@command("choices", "A | B | …")
def _choices(session: Session, argument: str) -> Reply:
    """Rank given continuations: /choices hot | cold | mild.

    Each text gets a leading space unless it is in double quotes, which are read as JSON: "\\n" | ", too".
    """
    from llama_scratch.microscope.choices import choices

    parts = list(split_at_bars(argument))
    # A text that was not in quotes gets a leading space.
    texts = [text if (text := unquoted(part)) != part else f" {part}" for part in parts]
    if len(texts) < 2 or "" in parts or "" in texts:
        raise UsageError(
            f"Invalid argument '{sanitize(argument)}' for /choices. Give two or more texts separated by |."
        )
    llama, ids = session.llama, session.ids
    with session.screen.progress() as progress:
        ranking = choices(llama, ids, texts, progress)
    return paged(session, ranking.as_json(), pages.page(ranking))
