"""What the network is made of: its rotations, its cache, its neurons, its numbers in each precision."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llama_scratch.config import PRECISIONS
from llama_scratch.errors import UsageError, sanitize
from llama_scratch.repl.commands.registry import Reply, command, first_word, paged, whole_number
from llama_scratch.repl.session import Session

if TYPE_CHECKING:
    from llama_scratch.llama import Llama
    from llama_scratch.system.progress import Progress

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

_ROPE = re.compile(r"(?:([0-9]{1,7})(?:\s+|\Z))?(?:[lL]?([0-9]{1,4})\.[hH]?([0-9]{1,4}))?")
_LAYER = re.compile(r"[lL]?([0-9]{1,4})")


def _layers(session: Session, _begun: str) -> Iterable[str]:
    return map(str, range(session.llama.args.n_layers)) if session.state.loading.ended else ()


@command("rope", "[POSITION] [LAYER.HEAD]")
def _rope(session: Session, argument: str) -> Reply:
    """How the rotary embedding turns queries and keys.

    Each pair's dial at a position, by default the last token's, unscaled and scaled; the last token's query in a head
    (0.0 unless told otherwise) before and after its turn; and how it meets the keys at each distance.
    """
    from llama_scratch.microscope.rope import rope
    from llama_scratch.render.pages import rope as pages

    if (matched := _ROPE.fullmatch(argument)) is None:
        raise UsageError(
            f"'{sanitize(argument)}' was given for /rope, expected a position such as 100, a head such as 3.2, or "
            "both, the position first."
        )
    position, layer, head = (None if group is None else int(group) for group in matched.groups())
    with session.screen.progress() as progress:
        found = rope(session.llama, session.ids, position, layer or 0, head or 0, progress)
    return paged(session, found.as_json(), pages.page(found))


@command("kv", "[LAYER]", complete=_layers)
def _kv(session: Session, argument: str) -> Reply:
    """What the key-value cache holds: tokens, bytes, lengths.

    With a layer: how long its keys and values are, head by head and token by token.
    """
    from llama_scratch.microscope.cache import cache, cached_layer
    from llama_scratch.render.pages import cache as pages

    llama, ids = session.llama, session.ids
    with session.screen.progress() as progress:
        if argument:
            found = cached_layer(llama, ids, _layer(argument, "kv"), progress)
            return paged(session, found.as_json(), pages.layer_page(found))
        whole = cache(llama, ids, progress)
    timing = session.state.snapshots[-1].prediction.timing
    facts = {"reused_tokens": timing.reused_tokens, "new_tokens": timing.prompt_tokens - timing.reused_tokens}
    return paged(session, whole.as_json() | facts, pages.page(whole, timing))


@command("neurons", "LAYER [COUNT]", complete=_layers)
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
        found = neurons(session.llama, session.ids, _layer(layer, "neurons"), number, progress)
    return paged(session, found.as_json(), pages.page(found))


def _layer(argument: str, name: str) -> int:
    """The number of a layer, which the microscope checks."""
    if (matched := _LAYER.fullmatch(argument)) is None:
        raise UsageError(f"'{sanitize(argument)}' was given for /{name}, expected a layer such as 5.")
    return int(matched[1])


def _variants(_session: Session, begun: str) -> Iterable[str]:
    given = begun.split(" ")[:-1]
    return [" ".join([*given, name]) for name in (*PRECISIONS[1:], "rope") if name not in given]


@command("numerics", "[PRECISION …]", complete=_variants)
def _numerics(session: Session, argument: str) -> Reply:
    """How far each precision is from fp32 on this text.

    By default bf16, fp16 and int8, and "rope", which is fp32 with the other RoPE factor; int4 where it is named. Each
    network is loaded anew, one at a time, without what /ablate, /patch and /steer changed.
    """
    from llama_scratch.microscope.numerics import USUAL, numerics
    from llama_scratch.render.pages import numerics as pages

    llama, ids = session.llama, session.ids

    def open(precision: str, progress: Progress) -> Llama:
        return session.open(str(llama.path), precision, progress)

    with session.screen.progress() as progress:
        found = numerics(llama, ids, open, argument.split() or USUAL, progress)
    without = {"without": session.state.labels} if session.state.labels else {}
    return paged(session, found.as_json() | without, pages.page(found, session.state.labels))
