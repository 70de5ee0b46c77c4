"""/rope: the rotary position embedding of queries and keys."""

from __future__ import annotations

import re

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Network")

_ROPE = re.compile(r"(?:([0-9]{1,7})(?:\s+|\Z))?(?:[lL]?([0-9]{1,4})\.[hH]?([0-9]{1,4}))?")


@command("rope", "[POSITION] [LAYER.HEAD]")
def _rope(session: Session, argument: str) -> Reply:
    """Rotary position embedding (RoPE) of queries and keys.

    Draws the angle of each pair of dimensions as a clock hand at three positions: 1, POSITION (default: the last
    token's) and the end of the context. Lists the angles at POSITION, unscaled and scaled. Then shows the last token's
    query in a head (default 0.0) before and after rotation, and its dot products with the keys by distance.
    """
    from llama_scratch.microscope.rope import rope
    from llama_scratch.render.pages import rope as pages

    if (matched := _ROPE.fullmatch(argument)) is None:
        raise UsageError(
            f"Invalid argument '{sanitize(argument)}' for /rope. Give a position such as 100, a head such as 3.2, or "
            "both, the position first."
        )
    position, layer, head = (None if group is None else int(group) for group in matched.groups())
    with session.screen.progress() as progress:
        rotation = rope(session.llama, session.ids, position, layer or 0, head or 0, progress)
    return paged(session, rotation.as_json(), pages.page(rotation))
