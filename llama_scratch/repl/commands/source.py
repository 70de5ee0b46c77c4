"""/source: the source code of a part of the package."""

from __future__ import annotations

from collections.abc import Iterable

from llama_scratch.render.pages import source as source_pages
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Interpretability")


def _names(_session: Session, _begun: str) -> Iterable[str]:
    from llama_scratch.microscope.source import names

    return names()


@command("source", "[NAME]", complete=_names)
def _source(session: Session, argument: str) -> Reply:
    """Show the source code of a concept or symbol: /source rope.

    NAME is a concept, function, class, method, module, command or line: /source KVCache.update, /source model,
    /source /lens, /source model.py:305. Without a name, lists the concepts.
    """
    from llama_scratch.microscope.source import concepts, source

    if not argument:
        listed = concepts()
        facts = {concept: [passage.name for passage in passages] for concept, passages in listed.items()}
        return paged(session, {"concepts": facts}, source_pages.contents(listed))
    passage = source(argument)
    return paged(session, passage.as_json(), source_pages.page(passage))
