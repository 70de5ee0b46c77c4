"""The neurons of a layer that write most."""

from __future__ import annotations

from llama_scratch.repl.commands.arguments import first_word, layer_number, layers, whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("Looking inside")


@command("neurons", "LAYER [COUNT]", complete=layers)
def _neurons(session: Session, argument: str) -> Reply:
    """The neurons of a layer that write most at the last token.

    What each writes into the residual stream, read through the unembedding: the tokens that it raises and lowers, and
    what it adds to the answer. COUNT of them are shown, 10 unless told otherwise.
    """
    from llama_scratch.microscope.neurons import neurons
    from llama_scratch.render.pages import neurons as pages

    layer, count = first_word(argument)
    number = whole_number(count, "COUNT") if count else 10
    with session.screen.progress() as progress:
        strongest = neurons(session.llama, session.ids, layer_number(layer, "neurons"), number, progress)
    return paged(session, strongest.as_json(), pages.page(strongest))
