"""Why a token is predicted: attribution to components and to words."""

from __future__ import annotations

import re

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.pages import attribution as pages
from llama_scratch.render.text import SPACE
from llama_scratch.repl.commands.arguments import candidates, one_token
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("Looking inside")


@command("why", "[TOKEN [vs TOKEN]]", complete=candidates)
def _why(session: Session, argument: str) -> Reply:
    """Why that token: which heads, layers and words speak for it.

    Without TOKEN it is the answer; with a second one it is what sets the two apart: /why Paris vs Rome. A word gets
    its space in front, unless it stands in double quotes, which are read as JSON; #7042 is a token by its id.

    What each part of the network adds to the logit (direct logit attribution) is computed on the file's weights in
    float32; what is left out or switched off is tried in the session's network.
    """
    from llama_scratch.microscope.attribution import why

    llama, ids = session.llama, session.ids
    first, *seconds = (part.strip() for part in re.split(r"\svs\s", f" {argument} ", maxsplit=1))
    second = seconds[0] if seconds else ""
    if seconds and not second:
        if first:
            raise UsageError(
                f"'{sanitize(argument)}' names one token, expected a second one behind 'vs', as in /why Paris vs Rome."
            )
        first = argument  # the token itself
    answer, versus = (_token(session, part) if part else None for part in (first, second))
    with session.screen.progress() as progress:
        reasons = why(llama, ids, answer, versus, progress)
    return paged(session, reasons.as_json(), pages.page(reasons))


def _token(session: Session, name: str) -> int:
    """The token that is meant: with a space in front where that is one token."""
    if name[0] not in f'#"{SPACE}' and not (session.now and name in candidates(session, "")):
        ids = session.llama.encode(f" {name}", bos=False)
        if len(ids) == 1:
            return ids[0]
    return one_token(session, name).id
