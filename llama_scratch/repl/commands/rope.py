"""How the rotary embedding turns queries and keys."""

from __future__ import annotations

import re

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("The network")

_ROPE = re.compile(r"(?:([0-9]{1,7})(?:\s+|\Z))?(?:[lL]?([0-9]{1,4})\.[hH]?([0-9]{1,4}))?")


@command("rope", "[POSITION] [LAYER.HEAD]")
def _rope(session: Session, argument: str) -> Reply:
    """How the rotary embedding turns queries and keys.

    Each pair's dial at a position, by default the last token's, unscaled and scaled; the last token's query in a head
    (0.0 unless told otherwise) before and after its turn; and how it meets the keys at each distance.
    """
    from llama_scratch.microscope.rope import rope
    from llama_scratch.render.pages import rope as pages

    if (matched := _ROPE.fullmatch(argument)) is None:
        raise UsageError(
            f"'{sanitize(argument)}' was given for /rope, expected a position such as 100, a head such as 3.2, or "
            "both, the position first."
        )
    position, layer, head = (None if group is None else int(group) for group in matched.groups())
    with session.screen.progress() as progress:
        rotation = rope(session.llama, session.ids, position, layer or 0, head or 0, progress)
    return paged(session, rotation.as_json(), pages.page(rotation))
