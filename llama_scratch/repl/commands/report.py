"""/report: all main views of a text on one web page."""

from __future__ import annotations

from collections.abc import Iterator

from llama_scratch.errors import sanitize
from llama_scratch.render.page import Page, joined
from llama_scratch.render.pages import attention as attention_pages
from llama_scratch.render.pages import attribution as why_pages
from llama_scratch.render.pages import inspection as inspection_pages
from llama_scratch.render.pages import lens as lens_pages
from llama_scratch.render.pages import neurons as neuron_pages
from llama_scratch.render.pages import surprisal as surprisal_pages
from llama_scratch.repl.commands.arguments import file_path, paths
from llama_scratch.repl.commands.pictures import drawer
from llama_scratch.repl.commands.registry import Reply, commands_under, note
from llama_scratch.repl.session import Session
from llama_scratch.repl.user_files import write_whole

command = commands_under("Session")


@command("report", "FILE.html", complete=paths, replayed=False)
def _report(session: Session, argument: str) -> Reply:
    """Write a report on the text: the main views on one web page.

    Contains the answer, surprisal, the logit lens, attribution, attention patterns and the strongest neurons. The page
    works offline and shows values under the pointer.
    """
    path = file_path(argument)
    draw = drawer(path, argument, "/report", (".html",))
    page = joined(f"What comes after “{session.text_of(session.ids)}”", tuple(_examined(session)))
    write_whole(path, draw(page))
    session.update(page=page)
    return note(f"Wrote the report to {sanitize(path, 200)}.", path=str(path), title=page.title)


def _examined(session: Session) -> Iterator[Page]:
    from llama_scratch.microscope.attention import head, heads
    from llama_scratch.microscope.attribution import why
    from llama_scratch.microscope.inspection import Inspection
    from llama_scratch.microscope.lens import lens
    from llama_scratch.microscope.neurons import neurons
    from llama_scratch.microscope.parts import NetworkPart
    from llama_scratch.microscope.surprisal import per_character, surprisal

    llama, ids = session.llama, session.ids
    with session.screen.progress() as progress:
        yield inspection_pages.page(Inspection(session.intact, ids, session.state.interventions))
        scored = surprisal(llama, ids, session.settings.top, progress)
        yield surprisal_pages.page(scored, session.text_of(ids), per_character(llama, scored.tokens))
        yield lens_pages.page(lens(llama, ids, progress=progress))
        reasons = why(llama, ids, progress=progress)
        yield why_pages.page(reasons)
        # Details of the two strongest heads and feed-forward networks in the attribution.
        parts = [NetworkPart.named(found.name, llama.args) for found in reasons.strongest]
        for part in [part for part in parts if part.kind == "head"][:2]:
            yield attention_pages.head(head(llama, ids, part.layer, part.index, progress=progress))
        for part in [part for part in parts if part.kind == "ffn"][:2]:
            yield neuron_pages.page(neurons(llama, ids, part.layer, progress=progress))
        yield attention_pages.heads(heads(llama, ids, progress=progress), whole=True)
