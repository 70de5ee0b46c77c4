"""The source of any part of the package."""

from __future__ import annotations

from collections.abc import Iterable

from llama_scratch.render.pages import source as source_pages
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("Looking inside")


def _names(_session: Session, _begun: str) -> Iterable[str]:
    from llama_scratch.microscope.source import names

    return names()


@command("source", "[NAME]", complete=_names)
def _source(session: Session, argument: str) -> Reply:
    """The source of any part: /source rope.

    A concept, a function, class or method, a module or a command: /source KVCache.update, /source model, /source /lens;
    or what stands at a line: /source model.py:305. Without a name it lists the concepts.
    """
    from llama_scratch.microscope.source import concepts, source

    if not argument:
        listed = concepts()
        facts = {concept: [passage.name for passage in passages] for concept, passages in listed.items()}
        return paged(session, {"concepts": facts}, source_pages.contents(listed))
    passage = source(argument)
    return paged(session, passage.as_json(), source_pages.page(passage))
