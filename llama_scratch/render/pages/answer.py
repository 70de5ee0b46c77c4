"""A prediction: the text and its most probable next tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llama_scratch.render.answer import took
from llama_scratch.render.page import Cell, Finding, Page, PageBlock, Paragraph, Running, Table, written
from llama_scratch.render.text import percent
from llama_scratch.results import Candidate, Prediction


def page(prediction: Prediction) -> Page:
    """Return a page with the text and the most probable next tokens."""
    parts: list[PageBlock] = [Finding(finding(prediction))]
    parts.append(Running(tuple(Cell(token.text, token=True) for token in prediction.tokens)))
    parts.append(_candidates(prediction.top))
    parts.append(Paragraph(took(prediction), "dim"))
    return Page("Next-token prediction", (*parts, *(Paragraph(sentence, "yellow") for sentence in prediction.warnings)))


def finding(prediction: Prediction) -> str:
    """Name the most probable next token, and the second one."""
    texts = [f"{written(each.text, token=True)} ({percent(each.probability)})" for each in prediction.top[:2]]
    sentence = f"The most probable next token is {texts[0]}"
    return f"{sentence}, ahead of {texts[1]}." if len(texts) > 1 else f"{sentence}."


def _candidates(top: Sequence[Candidate]) -> Table:
    rows = [
        (
            Cell(candidate.text, "" if rank else "bold", token=True),
            Cell(percent(candidate.probability)),
            Cell("", bar=candidate.probability, hover=f"id {candidate.id}, log-probability {candidate.logprob:.4f}"),
        )
        for rank, candidate in enumerate(top)
    ]
    return Table(("token", ">probability", ""), tuple(rows))
