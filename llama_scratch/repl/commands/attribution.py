"""/why: attribution of a prediction to components and input tokens."""

from __future__ import annotations

import re
from functools import partial

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.pages import attribution as pages
from llama_scratch.render.text import SPACE
from llama_scratch.repl.commands.arguments import candidates, one_token
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.growing import growing_view
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Interpretability")


@command("why", "[TOKEN [vs TOKEN]]", complete=candidates)
def _why(session: Session, argument: str) -> Reply:
    """Attribute a token's logit to heads, layers and input tokens.

    Without TOKEN, it explains the predicted token. With a second token, explains their logit difference: /why Paris vs
    Rome. A word gets a leading space unless it is in double quotes, which are read as JSON. #7042 is a token id.

    Direct logit attribution uses the file's weights in float32. Ablation and leave-one-out run the session's network.
    """
    from llama_scratch.microscope.attribution import growing

    llama, ids = session.llama, session.ids
    first, *seconds = (part.strip() for part in re.split(r"\svs\s", f" {argument} ", maxsplit=1))
    second = seconds[0] if seconds else ""
    if seconds and not second:
        if first:
            raise UsageError(
                f"'{sanitize(argument)}' has only one token. Add a second one after 'vs', as in /why Paris vs Rome."
            )
        first = argument  # the token "vs" itself
    answer, versus = (_token(session, part) if part else None for part in (first, second))
    with growing_view(session) as (progress, show):
        for reasons in growing(llama, ids, answer, versus, progress):
            show(partial(pages.growing, reasons))
    return paged(session, reasons.as_json(), pages.page(reasons))


def _token(session: Session, name: str) -> int:
    """Parse a token, with a leading space if that makes it one token."""
    if name[0] not in f'#"{SPACE}' and not (session.now and name in candidates(session, "")):
        ids = session.llama.encode(f" {name}", bos=False)
        if len(ids) == 1:
            return ids[0]
    return one_token(session, name).id
