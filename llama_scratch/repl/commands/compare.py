"""/compare: the prediction of another model or precision."""

from __future__ import annotations

from collections.abc import Iterable

from llama_scratch.precision import PRECISIONS
from llama_scratch.render.pages import compare as pages
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Predictions")


def _models(_session: Session, _begun: str) -> Iterable[str]:
    from llama_scratch.download.pypi import OPEN_MODELS

    return [*PRECISIONS, "auto", *OPEN_MODELS]


@command("compare", "MODEL", complete=_models)
def _compare(session: Session, argument: str) -> Reply:
    """Compare the prediction with another model or precision.

    Another model, given by its path or the name it was pulled under, runs in the current precision.
    """
    from llama_scratch.microscope.compare import compare

    llama, ids = session.llama, session.ids
    with session.screen.progress() as progress:
        same = argument in (*PRECISIONS, "auto")
        source, precision = (str(llama.path), argument) if same else (argument, llama.info.precision)
        other = session.open(source, precision, progress)
        try:
            for each in (llama, other):  # wait until the requested precision is ready
                each.prepare(progress)
            comparison = compare(llama, other, ids, session.settings.top, progress)
        finally:
            other.close()
    return paged(session, comparison.as_json(), pages.page(comparison))
