"""How far each precision is from float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from llama_scratch.precision import PRECISIONS
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session
from llama_scratch.system.progress import Progress

if TYPE_CHECKING:
    from llama_scratch.llama import Llama


# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("The network")


def _variants(_session: Session, begun: str) -> Iterable[str]:
    earlier = begun.split(" ")[:-1]
    return [" ".join([*earlier, name]) for name in (*PRECISIONS[1:], "rope") if name not in earlier]


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
        comparison = numerics(llama, ids, open, argument.split() or USUAL, progress)
    without = {"without": session.state.labels} if session.state.labels else {}
    return paged(session, comparison.as_json() | without, pages.page(comparison, session.state.labels))
