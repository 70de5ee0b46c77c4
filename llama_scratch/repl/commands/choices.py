"""How probable given continuations are."""

from __future__ import annotations

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.pages import choices as pages
from llama_scratch.repl.commands.arguments import split_at_bars, unquoted
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("Looking at it")


@command("choices", "A | B | …")
def _choices(session: Session, argument: str) -> Reply:
    """How probable each continuation is: /choices hot | cold | mild.

    Each gets a space in front, unless it stands in double quotes, which are read as JSON: "\\n" | ", too".
    """
    from llama_scratch.microscope.choices import choices

    parts = list(split_at_bars(argument))
    # Quotes are gone where they were read.
    texts = [text if (text := unquoted(part)) != part else f" {part}" for part in parts]
    if len(texts) < 2 or "" in parts or "" in texts:
        raise UsageError(
            f"'{sanitize(argument)}' was given for /choices, expected two or more texts with a | between them."
        )
    llama, ids = session.llama, session.ids
    with session.screen.progress() as progress:
        ranking = choices(llama, ids, texts, progress)
    return paged(session, ranking.as_json(), pages.page(ranking))
