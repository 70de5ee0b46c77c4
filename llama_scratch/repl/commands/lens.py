"""/lens: the logit lens, drawn while it is computed."""

from __future__ import annotations

import re
from functools import partial

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.pages import lens as lens_pages
from llama_scratch.repl.commands.arguments import window_start
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.growing import growing_view
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Interpretability")

_LENS = re.compile(r"(ranks)?(?:\s*\b([0-9]{1,9}))?")


@command("lens", "[ranks] [POSITION]", complete=lambda _session, _begun: ["ranks"])
def _lens(session: Session, argument: str) -> Reply:
    """Logit lens: the prediction after each layer.

    Shows the most probable token at each layer and position, shaded by its probability. A narrow screen shows the last
    positions, or those from POSITION (counted from 0). With ranks: the rank of the final prediction at each layer.

    The residual stream after each layer goes through the final norm and the unembedding.
    """
    from llama_scratch.microscope.lens import LENS_POSITIONS, growing

    matched = _LENS.fullmatch(argument)
    if matched is None:
        raise UsageError(
            f"Invalid argument '{sanitize(argument)}' for /lens. Give a position such as 0, or ranks, or both."
        )
    llama, ids, ranks = session.llama, session.ids, bool(matched[1])
    position = int(matched[2]) if matched[2] else None
    first = window_start(position, len(ids), LENS_POSITIONS)
    with growing_view(session) as (progress, show):
        for grid in growing(llama, ids, first, progress=progress):
            show(partial(lens_pages.growing, grid, ranks=ranks))
    return paged(session, grid.as_json(), lens_pages.page(grid, position, ranks=ranks))
