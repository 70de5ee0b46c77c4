"""The parts of the network: shapes, parameters, costs."""

from __future__ import annotations

from llama_scratch.render.pages import architecture as architecture_pages
from llama_scratch.repl.commands.arguments import whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("The network")

# The length that /arch takes where there is no text.
_LENGTH = 1024


@command("arch", "[LENGTH]")
def _arch(session: Session, argument: str) -> Reply:
    """The network's parts: shapes, parameters, FLOPs and bytes.

    What attention costs depends on how much there is to look at: the text so far, or a text of LENGTH tokens.
    """
    from llama_scratch.microscope.architecture import architecture

    llama = session.llama
    length = len(session.ids) if session.now else min(_LENGTH, llama.context)
    parts = architecture(llama, whole_number(argument, "the length") if argument else length)
    return paged(session, parts.as_json(), architecture_pages.page(parts))
