"""A report: one sentence and one picture of a prediction, then all views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Heatmap, PageBlock, Table, written
from llama_scratch.render.report_page import Arcs, ReportPage, Section, Stream, report
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.lens import Lens
    from llama_scratch.microscope.summary import Ablation, Link, Summary
    from llama_scratch.results import Candidate

# A component matters if ablating it leaves the answer at most this share of its probability.
_MATTERS = 0.5
# A head reads a token if at least this share of its attention goes to it.
_READS = 0.5
# Maximum number of columns of the picture.
_COLUMNS = 32


def page(
    summary: Summary,
    prompt: str,
    candidates: Sequence[Candidate],
    sections: tuple[Section, ...],
    interventions: Sequence[str] = (),
) -> ReportPage:
    """Return the report of a prediction.

    The sentence and the picture combine the lens, the attribution and the attention.

    Args:
        summary: The measurements.
        prompt: The text.
        candidates: The most probable next tokens.
        sections: The views.
        interventions: The labels of the interventions.
    """
    changed = f"With {', '.join(interventions)}: " if interventions else ""
    sentence = f"{changed}{finding(summary)}"
    return report(prompt, sentence, _stream(summary), (_next(candidates), *_head(summary)), sections)


# --- The sentence -----------------------------------------------------------------------------


def finding(summary: Summary) -> str:
    """Name the answer, the component it depends on, and the layer from which it leads."""
    answer = summary.attribution.answer
    said = f"{_token(answer.text)}, {percent(answer.probability)}. {_cause(summary)}"
    if summary.lens.answers[-1].id != answer.id:
        return f"{said}."
    layer = summary.lens.stays_from()
    start = "the embedding" if layer < 0 else f"layer {layer}"
    return f"{said}; {_token(answer.text)} is the top prediction from {start} on."


def _cause(summary: Summary) -> str:
    answer, head, component = summary.attribution.answer, summary.head, summary.component
    name = _token(answer.text)
    if component is None:
        return f"Without heads to ablate, no component is singled out for {name}"
    if head is not None and _matters(summary, head):
        falls = f"without this head, {name} falls to {percent(head.after)}"
        return f"{_reading(summary, head.name)}; {falls}"
    if _matters(summary, component):
        falls = f"without {component.name}, {name} falls to {percent(component.after)}"
        return f"No single head among the strongest explains it; {falls}"
    kept = f"without {component.name}, {name} still has {percent(component.after)}"
    return f"No single component explains it: {kept}"


def _matters(summary: Summary, ablation: Ablation) -> bool:
    return ablation.after <= _MATTERS * summary.attribution.answer.probability


def _reading(summary: Summary, head: str) -> str:
    last = _token(summary.attribution.tokens[-1].text)
    if not (links := summary.links[head]):
        return f"Head {head} matters at {last}, where its attention is spread over many tokens"
    key, share = _token(summary.attribution.tokens[links[0].position].text), percent(links[0].share)
    if links[0].share >= _READS:
        return f"{key} is read by head {head} at {last} ({share} of its attention)"
    return f"Head {head} matters at {last}, where its largest attention goes to {key} ({share})"


def _token(text: str) -> str:
    return written(text, token=True)


# --- The picture ------------------------------------------------------------------------------


def _stream(summary: Summary) -> Stream:
    lens, answer = summary.lens, summary.attribution.answer
    shown = summary.head if summary.head is not None and _matters(summary, summary.head) else None
    return Stream(
        _heatmap(lens),
        answer.text,
        answer.probability,
        tuple(row.guesses[-1].rank_of_answer for row in lens.layers),
        tuple(_arcs(summary, head, links) for head, links in summary.links.items()),
        shown.name if shown else "",
    )


def _heatmap(lens: Lens) -> Heatmap:
    """The last columns of the lens as a heat map, with a sentence as the tooltip of each field."""
    columns = slice(-_COLUMNS, None)
    tokens, answers = lens.tokens[columns], lens.answers[columns]
    names = ["the embedding" if row.layer < 0 else f"layer {row.layer}" for row in lens.layers]
    length = f" of the last {len(tokens)} of {lens.length:,} tokens" if len(tokens) < lens.length else ""
    return Heatmap(
        title=f"Residual stream{length}: the top prediction after each layer",
        rows=tuple("emb" if row.layer < 0 else f"L{row.layer}" for row in lens.layers),
        columns=tuple(token.text for token in tokens),
        values=tuple(tuple(guess.probability for guess in row.guesses[columns]) for row in lens.layers),
        texts=tuple(tuple(guess.text for guess in row.guesses[columns]) for row in lens.layers),
        hovers=tuple(
            tuple(
                f"At {_token(token.text)} after {name}, {_token(guess.text)} is the top prediction: "
                f"{percent(guess.probability)}. {_token(answer.text)} has rank {guess.rank_of_answer:,}."
                for token, guess, answer in zip(tokens, row.guesses[columns], answers, strict=True)
            )
            for name, row in zip(names, lens.layers, strict=True)
        ),
    )


def _arcs(summary: Summary, head: str, links: tuple[Link, ...]) -> Arcs:
    tokens = summary.attribution.tokens
    first = len(tokens) - min(_COLUMNS, len(summary.lens.tokens))
    shares = ", ".join(f"{_token(tokens[link.position].text)} {percent(link.share)}" for link in links)
    looks = f"{_token(tokens[-1].text)} looks at {shares}." if links else "its attention is spread over many tokens."
    layer = int(head[1:].partition(".")[0])
    columns = tuple((max(-1, link.position - first), link.share) for link in links)
    return Arcs(head, layer + 1, columns, f"Head {head}: {looks}")


# --- Beside the picture -----------------------------------------------------------------------


def _next(candidates: Sequence[Candidate]) -> Table:
    rows = tuple(
        (
            Cell(candidate.text, "" if rank else "bold", token=True),
            Cell(percent(candidate.probability), bar=candidate.probability),
        )
        for rank, candidate in enumerate(candidates)
    )
    return Table(("token", ">probability"), rows, "Next token")


def _head(summary: Summary) -> tuple[PageBlock, ...]:
    """The attention of the head that matters most, and the ablations."""
    before, tokens = summary.attribution.answer, summary.attribution.tokens
    blocks: list[PageBlock] = []
    if summary.head is not None and (links := summary.links[summary.head.name]):
        rows = tuple(
            (Cell(tokens[link.position].text, token=True), Cell(percent(link.share), bar=link.share)) for link in links
        )
        title = f"Attention of {summary.head.name} from {_token(tokens[-1].text)}"
        blocks.append(Table(("token", ">attention"), rows, title))
    ablations = tuple(
        (Cell(each.name), Cell(percent(each.after), bar=each.after))
        for each in sorted(summary.ablations, key=lambda each: each.after)
    )
    if ablations:
        whole = (Cell("nothing", "dim"), Cell(percent(before.probability), bar=before.probability))
        title = f"{_token(before.text)} without a component"
        blocks.append(Table(("ablated", ">probability"), (whole, *ablations), title))
    return tuple(blocks)
