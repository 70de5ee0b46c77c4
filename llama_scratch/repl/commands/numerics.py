"""/numerics: the error of each precision relative to float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from llama_scratch.precision import PRECISIONS
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session
from llama_scratch.results import merged
from llama_scratch.system.progress import Progress

if TYPE_CHECKING:
    from llama_scratch.llama import Llama


# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Network")


def _variants(_session: Session, begun: str) -> Iterable[str]:
    earlier = begun.split(" ")[:-1]
    return [" ".join([*earlier, name]) for name in (*PRECISIONS[1:], "rope") if name not in earlier]


@command("numerics", "[PRECISION …]", complete=_variants)
def _numerics(session: Session, argument: str) -> Reply:
    """Compare each precision with fp32 on this text.

    Default: bf16, fp16, int8, and "rope", which is fp32 with the other RoPE factor. int4 runs only if it is named.
    Each network is loaded separately, one at a time, without the interventions of /ablate, /patch and /steer.
    """
    from llama_scratch.microscope.numerics import USUAL, numerics
    from llama_scratch.render.pages import numerics as pages

    llama, ids = session.llama, session.ids

    def open(precision: str, progress: Progress) -> Llama:
        return session.open(str(llama.path), precision, progress)

    with session.screen.progress() as progress:
        comparison = numerics(llama, ids, open, argument.split() or USUAL, progress)
    without = {"without": session.state.labels} if session.state.labels else {}
    return paged(session, merged(comparison.as_json(), without), pages.page(comparison, session.state.labels))
