"""/arch: the components of the network with their shapes, parameters and costs."""

from __future__ import annotations

from llama_scratch.render.pages import architecture as architecture_pages
from llama_scratch.repl.commands.arguments import whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Network")

# Length in tokens that /arch assumes if there is no text.
_LENGTH = 1024


@command("arch", "[LENGTH]")
def _arch(session: Session, argument: str) -> Reply:
    """Network components: shapes, parameters, FLOPs and bytes.

    Draws the network along its residual stream. The cost of attention depends on the length of the text: the
    text so far, or LENGTH tokens.
    """
    from llama_scratch.microscope.architecture import architecture

    llama = session.llama
    length = len(session.ids) if session.now else min(_LENGTH, llama.context)
    parts = architecture(llama, whole_number(argument, "the length") if argument else length)
    return paged(session, parts.as_json(), architecture_pages.page(parts))
