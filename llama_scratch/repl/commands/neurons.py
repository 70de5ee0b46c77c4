"""/neurons: the strongest feed-forward neurons of a layer."""

from __future__ import annotations

from llama_scratch.repl.commands.arguments import first_word, layer_number, layers, whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Interpretability")


@command("neurons", "LAYER [COUNT]", complete=layers)
def _neurons(session: Session, argument: str) -> Reply:
    """The strongest neurons of a layer at the last token.

    For each neuron, its output is projected through the unembedding: the tokens that it promotes and suppresses, and
    its direct effect on the answer's logit. Shows COUNT neurons (default 10).
    """
    from llama_scratch.microscope.neurons import neurons
    from llama_scratch.render.pages import neurons as pages

    layer, count = first_word(argument)
    number = whole_number(count, "COUNT") if count else 10
    with session.screen.progress() as progress:
        strongest = neurons(session.llama, session.ids, layer_number(layer, "neurons"), number, progress)
    return paged(session, strongest.as_json(), pages.page(strongest))
