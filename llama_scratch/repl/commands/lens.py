"""What each layer would say, and what each head looks at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import RenderableType
from rich.text import Text

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render import to_terminal
from llama_scratch.render.page import Page
from llama_scratch.render.pages import attention as attention_pages
from llama_scratch.render.pages import lens as lens_pages
from llama_scratch.render.progress import live_display
from llama_scratch.repl.commands.registry import Reply, command, first_word, paged, whole_number
from llama_scratch.repl.session import Session
from llama_scratch.system.progress import Progress

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

_LENS = re.compile(r"(ranks)?(?:\s*\b([0-9]{1,9}))?")
# Rows of a screen that a page which grows leaves to its title, its labels and what stands around them. What is taller
# than the screen cannot be taken off it.
_AROUND = 13

Draw = Callable[[str, int], Page]
"""A page of what is there so far: it gets a line that says how far it is, and the rows that there is room for."""


@contextmanager
def _watched(session: Session) -> Iterator[tuple[Progress, Callable[[Draw], None]]]:
    """What to tell how far something is, and what is there of its page: shown on a terminal, and gone afterwards."""
    console = session.screen.console
    watched = session.screen.interactive and console.file.isatty() and not console.is_dumb_terminal
    if not watched or session.settings.plain or console.height <= _AROUND:
        with session.screen.progress() as progress:
            yield progress, lambda draw: None
        return
    # Imported here, so that a prompt or an answer which needs it not does not wait for it.
    from rich.live import Live

    said, page = "", None

    def report(stage: str, done: int, total: int) -> None:
        nonlocal said
        said = f"{stage.capitalize()} {done:,} of {total:,}"

    def show(draw: Draw) -> None:
        nonlocal page
        page = draw

    def view() -> RenderableType:
        return to_terminal.view(page(said, console.height - _AROUND)) if page else Text(" " + said)

    with live_display(Live(get_renderable=view, console=console, refresh_per_second=8, transient=True)):
        yield report, show


@command("lens", "[ranks] [POSITION]", complete=lambda _session, _begun: ["ranks"])
def _lens(session: Session, argument: str) -> Reply:
    """What each layer would say if the network ended there.

    For every layer and position the best guess, shaded by its probability; a narrow screen shows the last positions,
    or those from POSITION on, counted from 0. With ranks: where the final answer stands among all tokens there.

    This is the logit lens: what stands behind a layer goes through the final norm and the unembedding.
    """
    from llama_scratch.microscope.lens import WINDOW, growing

    matched = _LENS.fullmatch(argument)
    if matched is None:
        raise UsageError(
            f"'{sanitize(argument)}' was given for /lens, expected a position such as 0, or ranks, or both."
        )
    llama, ids, ranks = session.llama, session.ids, bool(matched[1])
    position = int(matched[2]) if matched[2] else None
    first = _window(position, len(ids), WINDOW)
    with _watched(session) as (progress, show):
        for found in growing(llama, ids, first, progress=progress):
            show(partial(lens_pages.growing, found, ranks=ranks))
    return paged(session, found.as_json(), lens_pages.page(found, position, ranks=ranks))


@command("attention", "[LAYER[.HEAD]] [POSITION]")
def _attention(session: Session, argument: str) -> Reply:
    """What attention heads look at, and what kind each looks like.

    Without an argument all heads, with a layer (L5) that layer's, with a head (L5.H3) its map of the text; of a long
    text the last tokens, or those from POSITION on, counted from 0.

    Kinds: previous token, first token, duplicate token, and induction: a head that looks at what came after the same
    token before. The scores that say so are measured on random tokens that come twice.
    """
    from llama_scratch.microscope.attention import WINDOW, head, heads
    from llama_scratch.microscope.parts import NetworkPart

    llama, ids = session.llama, session.ids
    if not argument:
        with session.screen.progress() as progress:
            found = heads(llama, ids, progress=progress)
        reply = paged(session, found.as_json(), attention_pages.heads(found))
        session.update(page=attention_pages.heads(found, whole=True))  # a picture has room for all of them
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
            found = heads(llama, ids, part.layer, progress)
            return paged(session, found.as_json(), attention_pages.heads(found))
        one = head(llama, ids, part.layer, part.index, _window(position, len(ids), WINDOW), progress)
    return paged(session, one.as_json(), attention_pages.head(one, position))


def _window(position: int | None, length: int, window: int) -> int:
    """Where the positions that are looked at begin.

    A position among the last ones is a place to scroll to; one further in front has a window of its own.
    """
    last = max(0, length - window)
    return last if position is None or last <= position < length else position
