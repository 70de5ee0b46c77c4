"""What each attention head looks at."""

from __future__ import annotations

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.pages import attention as attention_pages
from llama_scratch.repl.commands.arguments import first_word, whole_number, window_start
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("Looking inside")


@command("attention", "[LAYER[.HEAD]] [POSITION]")
def _attention(session: Session, argument: str) -> Reply:
    """What attention heads look at, and what kind each looks like.

    Without an argument all heads, with a layer (L5) that layer's, with a head (L5.H3) its map of the text; of a long
    text the last tokens, or those from POSITION on, counted from 0.

    Kinds: previous token, first token, duplicate token, and induction: a head that looks at what came after the same
    token before. The scores that say so are measured on random tokens that come twice.
    """
    from llama_scratch.microscope.attention import MAP_POSITIONS, head, heads
    from llama_scratch.microscope.parts import NetworkPart

    llama, ids = session.llama, session.ids
    if not argument:
        with session.screen.progress() as progress:
            gallery = heads(llama, ids, progress=progress)
        reply = paged(session, gallery.as_json(), attention_pages.heads(gallery))
        session.update(page=attention_pages.heads(gallery, whole=True))  # a picture has room for all of them
        return reply
    name, where = first_word(argument)
    part = NetworkPart.named(name, llama.args)
    if part.kind not in ("layer", "head") or (where and part.kind == "layer"):
        raise UsageError(
            f"'{sanitize(argument)}' was given for /attention, expected a layer such as L5, or a head such as L5.H3 "
            "and, if need be, a position."
        )
    position = whole_number(where, "the position", least=0) if where else None
    with session.screen.progress() as progress:
        if part.kind == "layer":
            gallery = heads(llama, ids, part.layer, progress)
            return paged(session, gallery.as_json(), attention_pages.heads(gallery))
        one = head(llama, ids, part.layer, part.index, window_start(position, len(ids), MAP_POSITIONS), progress)
    return paged(session, one.as_json(), attention_pages.head(one, position))
