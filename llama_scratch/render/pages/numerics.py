"""Divergence of each precision from fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Finding, Page, PageBlock, Paragraph, Table, written
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # they import torch
    from llama_scratch.microscope.numerics import Numerics
    from llama_scratch.results import Candidate

_SOURCE = ("numerics", "precision")


def page(numerics: Numerics, without: Sequence[str] = ()) -> Page:
    """Return a page of the top predictions and divergences of each network.

    Args:
        numerics: The comparison.
        without: Labels of interventions in the session, which do not apply here.
    """
    there = [(row.name, row.distance) for row in numerics.rows if row.distance]
    answers = tuple(
        _answer(name, answer, numerics.reference)
        for name, answer in [("fp32", numerics.reference), *((name, distance.answer) for name, distance in there)]
    )
    distances = tuple(
        (
            Cell(name),
            Cell(_bits(distance.mean_kl_bits)),
            Cell(_bits(distance.max_kl_bits)),
            Cell(numerics.tokens[distance.worst].text, token=True, hover=f"position {distance.worst}"),
            Cell(f"{distance.changed:,}", "bold" if distance.changed else ""),
        )
        for name, distance in there
    )
    parts: tuple[PageBlock, ...] = (
        Finding(finding(numerics)),
        Table(("", "answer", ">"), answers, "Top prediction in each precision"),
        Table(
            ("", ">mean", ">max", "after", ">changed"),
            distances,
            f"KL divergence from fp32 in bits, {_compared(numerics)}",
        ),
        *(Paragraph(f"{row.name}: {row.error}", "yellow") for row in numerics.rows if not row.distance),
        *([Paragraph(f"The networks run without the interventions {', '.join(without)}.")] if without else []),
        Paragraph(
            "0 bits: equal predictions. max: the largest divergence, and the token after which it occurs. "
            "changed: number of positions with a different top prediction."
            + (
                " RoPE: fp32 with this scaling factor; the difference appears at distant positions first."
                if any(row.name.startswith("RoPE") for row in numerics.rows)
                else ""
            ),
            "dim",
        ),
    )
    return Page("Precision", tuple(part for part in parts if not isinstance(part, Table) or part.rows), _SOURCE)


def finding(numerics: Numerics) -> str:
    """State which networks change the answer, and which one diverges most from fp32."""
    there = [(row.name, row.distance) for row in numerics.rows if row.distance]
    answer = f"{written(numerics.reference.text, token=True)} ({percent(numerics.reference.probability)})"
    if not there:
        return f"fp32 predicts {answer}. No other network was compared."
    others = [
        f"{name} predicts {written(distance.answer.text, token=True)}"
        for name, distance in there
        if distance.answer.id != numerics.reference.id
    ]
    sentence = f"fp32 predicts {answer}; {' and '.join(others) or 'so does each other network'}."
    name, distance = max(there, key=lambda pair: pair[1].max_kl_bits)
    if not distance.max_kl_bits:
        return f"{sentence} All predictions are equal."
    worst = written(numerics.tokens[distance.worst].text, token=True)
    return f"{sentence} The largest divergence is that of {name}: {_bits(distance.max_kl_bits)} bits after {worst}."


def _answer(name: str, answer: Candidate, reference: Candidate) -> tuple[Cell, ...]:
    return (
        Cell(name),
        Cell(answer.text, "" if answer.id == reference.id else "bold", token=True),
        Cell(percent(answer.probability)),
    )


def _compared(numerics: Numerics) -> str:
    if numerics.positions == 1:
        return "after 1 token"
    if numerics.first:
        return f"after each of the last {numerics.positions:,} of {len(numerics.tokens):,} tokens"
    return f"after each of {numerics.positions:,} tokens"


def _bits(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}" if value else "0"
