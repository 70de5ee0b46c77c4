"""/kv: the contents of the KV cache."""

from __future__ import annotations

from llama_scratch.repl.commands.arguments import layer_number, layers
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session
from llama_scratch.results import merged

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Network")


@command("kv", "[LAYER]", complete=layers)
def _kv(session: Session, argument: str) -> Reply:
    """KV cache: tokens, bytes, and norms of the keys and values.

    The heat maps show the norms at each layer and position, averaged over heads. With a layer: the
    norms of its keys and values, per head and token.
    """
    from llama_scratch.microscope.cache import cache, cached_layer
    from llama_scratch.render.pages import cache as pages

    llama, ids = session.llama, session.ids
    with session.screen.progress() as progress:
        if argument:
            layer_cache = cached_layer(llama, ids, layer_number(argument, "kv"), progress)
            return paged(session, layer_cache.as_json(), pages.layer_page(layer_cache))
        whole = cache(llama, ids, progress)
    timing = session.state.snapshots[-1].prediction.timing
    facts = {"reused_tokens": timing.reused_tokens, "new_tokens": timing.prompt_tokens - timing.reused_tokens}
    return paged(session, merged(whole.as_json(), facts), pages.page(whole, timing))
