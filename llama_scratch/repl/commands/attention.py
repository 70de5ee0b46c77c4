"""/attention: attention patterns and head types."""

from __future__ import annotations

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.pages import attention as attention_pages
from llama_scratch.repl.commands.arguments import first_word, whole_number, window_start
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Interpretability")


@command("attention", "[LAYER[.HEAD]] [POSITION]")
def _attention(session: Session, argument: str) -> Reply:
    """Attention patterns of the heads, and the type of each head.

    Without an argument, all heads; with a layer (L5), the heads of that layer; with a head (L5.H3), its attention
    pattern. For a long text, the pattern shows the last tokens, or those from POSITION (counted from 0).

    Types: previous-token, first-token, duplicate-token and induction heads. An induction head attends to the token
    after an earlier occurrence of the current token. The scores are measured on a repeated sequence of random tokens.
    """
    from llama_scratch.microscope.attention import MAP_POSITIONS, head, heads
    from llama_scratch.microscope.parts import NetworkPart

    llama, ids = session.llama, session.ids
    if not argument:
        with session.screen.progress() as progress:
            gallery = heads(llama, ids, progress=progress)
        reply = paged(session, gallery.as_json(), attention_pages.heads(gallery))
        session.update(page=attention_pages.heads(gallery, whole=True))  # a picture has room for all heads
        return reply
    name, where = first_word(argument)
    part = NetworkPart.named(name, llama.args)
    if part.kind not in ("layer", "head") or (where and part.kind == "layer"):
        raise UsageError(
            f"Invalid argument '{sanitize(argument)}' for /attention. Give a layer such as L5, or a head such as L5.H3 "
            "with an optional position."
        )
    position = whole_number(where, "the position", least=0) if where else None
    with session.screen.progress() as progress:
        if part.kind == "layer":
            gallery = heads(llama, ids, part.layer, progress)
            return paged(session, gallery.as_json(), attention_pages.heads(gallery))
        first = window_start(position, len(ids), MAP_POSITIONS)
        answer = session.now.prediction.next if session.now else None
        one = head(llama, ids, part.layer, part.index, first, progress, answer)
    return paged(session, one.as_json(), attention_pages.head(one, position))
