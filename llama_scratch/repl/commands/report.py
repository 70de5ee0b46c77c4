"""/report: all main views of a text on one web page."""

from __future__ import annotations

from llama_scratch.errors import sanitize
from llama_scratch.render.pages import attention as attention_pages
from llama_scratch.render.pages import attribution as why_pages
from llama_scratch.render.pages import inspection as inspection_pages
from llama_scratch.render.pages import lens as lens_pages
from llama_scratch.render.pages import neurons as neuron_pages
from llama_scratch.render.pages import report as report_pages
from llama_scratch.render.pages import surprisal as surprisal_pages
from llama_scratch.render.report_page import ReportPage, Section
from llama_scratch.repl.commands.arguments import file_path, paths
from llama_scratch.repl.commands.pictures import drawer
from llama_scratch.repl.commands.registry import Reply, commands_under, note
from llama_scratch.repl.session import Session
from llama_scratch.repl.user_files import write_whole

# The command imports the microscope when it runs: it imports torch, which would delay the prompt.

command = commands_under("Session")


@command("report", "FILE.html", complete=paths, replayed=False)
def _report(session: Session, argument: str) -> Reply:
    """Write a report on the text: the main views on one web page.

    The page begins with the answer, the component it depends on most, and a picture of the residual stream. Surprisal,
    the logit lens, attribution, attention patterns and the strongest neurons follow. The page works offline and shows
    values under the pointer.
    """
    path = file_path(argument)
    draw = drawer(path, argument, "/report", (".html",))
    page = _examined(session)
    write_whole(path, draw(page))
    session.update(page=page)
    return note(f"Wrote the report to {sanitize(path, 200)}.", path=str(path), title=page.title)


def _examined(session: Session) -> ReportPage:
    from llama_scratch.microscope.attention import head, heads
    from llama_scratch.microscope.attribution import why
    from llama_scratch.microscope.inspection import Inspection
    from llama_scratch.microscope.neurons import neurons
    from llama_scratch.microscope.parts import NetworkPart
    from llama_scratch.microscope.summary import summary
    from llama_scratch.microscope.surprisal import per_character, surprisal

    llama, ids, text = session.llama, session.ids, session.text_of(session.ids)
    with session.screen.progress() as progress:
        inspection = Inspection(session.intact, ids, session.state.interventions)
        scored = surprisal(llama, ids, session.settings.top, progress)
        reasons = why(llama, ids, progress=progress)
        measured = summary(llama, ids, reasons, progress)
        sections = [
            Section(inspection_pages.page(inspection)),
            Section(surprisal_pages.page(scored, text, per_character(llama, scored.tokens))),
            Section(lens_pages.page(measured.lens)),
            Section(why_pages.page(reasons)),
        ]
        # Details of the two strongest heads and feed-forward networks in the attribution.
        parts = [NetworkPart.named(found.name, llama.args) for found in reasons.strongest]
        for part in [part for part in parts if part.kind == "head"][:2]:
            view = head(llama, ids, part.layer, part.index, progress=progress, answer=reasons.answer)
            sections.append(Section(attention_pages.head(view), part.name))
        for part in [part for part in parts if part.kind == "ffn"][:2]:
            sections.append(Section(neuron_pages.page(neurons(llama, ids, part.layer, progress=progress)), part.name))
        sections.append(Section(attention_pages.heads(heads(llama, ids, progress=progress), whole=True)))
    labels = [each.label for each in session.state.interventions]
    return report_pages.page(measured, text, inspection.prediction.top, tuple(sections), labels)
