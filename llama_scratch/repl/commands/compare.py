"""What another model or precision predicts."""

from __future__ import annotations

from collections.abc import Iterable

from llama_scratch.precision import PRECISIONS
from llama_scratch.render.pages import compare as pages
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("Looking at it")


def _models(_session: Session, _begun: str) -> Iterable[str]:
    from llama_scratch.download.pypi import OPEN_MODELS

    return [*PRECISIONS, "auto", *OPEN_MODELS]


@command("compare", "MODEL", complete=_models)
def _compare(session: Session, argument: str) -> Reply:
    """What another model, or precision, says after the text.

    Another model, by its path or the name under which it was pulled, runs in this one's precision.
    """
    from llama_scratch.microscope.compare import compare

    llama, ids = session.llama, session.ids
    with session.screen.progress() as progress:
        same = argument in (*PRECISIONS, "auto")
        source, precision = (str(llama.path), argument) if same else (argument, llama.info.precision)
        other = session.open(source, precision, progress)
        try:
            for each in (llama, other):  # so that the precision that is named is the one that answers
                each.prepare(progress)
            comparison = compare(llama, other, ids, session.settings.top, progress)
        finally:
            other.close()
    return paged(session, comparison.as_json(), pages.page(comparison))
