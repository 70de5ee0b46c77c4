"""Predictions of two models on the same text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Finding, Page, Paragraph, Table, written
from llama_scratch.render.text import percent
from llama_scratch.results import Candidate

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.compare import Comparison, ModelPrediction


def page(comparison: Comparison) -> Page:
    """Return a page of the top tokens of both models with both probabilities."""
    names = _names(comparison)
    rows = [
        (
            Cell(token.text, token=True),
            _share(token.first, comparison.first, names[0]),
            _share(token.second, comparison.second, names[1]),
        )
        for token in comparison.tokens
    ]
    table = Table(("token", *(f">{name}" for name in names)), tuple(rows))
    return Page("Two models", (Finding(finding(comparison)), table, Paragraph("\n".join(_summary(comparison)))))


def finding(comparison: Comparison) -> str:
    """State whether the models predict the same token, and their divergence."""
    (name, other), (first, second) = _names(comparison), (comparison.first.top[0], comparison.second.top[0])
    one, two = (f"{written(top.text, token=True)} ({percent(top.probability)})" for top in (first, second))
    # Ids of different vocabularies cannot be compared.
    same = first.text == second.text if comparison.kl_bits is None else first.id == second.id
    sentence = f"{name} predicts {one}, and {other} predicts {two}"
    if same:
        sentence = f"Both predict {written(first.text, token=True)}: {name} with {percent(first.probability)}, "
        sentence += f"{other} with {percent(second.probability)}"
    sentence = sentence[0].upper() + sentence[1:] if name == "first" else sentence
    return f"{sentence}." if comparison.kl_bits is None else f"{sentence}; {comparison.kl_bits:.3g} bits apart (KL)."


def _share(candidate: Candidate | None, side: ModelPrediction, name: str) -> Cell:
    """A probability, which is marked if the token is the model's top prediction."""
    if candidate is None:
        return Cell("no token", "dim", said=f"not in the vocabulary of {name}")
    share = percent(candidate.probability)
    if candidate.id == side.top[0].id:
        return Cell(f"▸ {share}", "bold", said=f"{name} {share}, its top prediction")
    return Cell(share)


def _names(comparison: Comparison) -> tuple[str, str]:
    """Short names: the precisions if only they differ, otherwise first and second."""
    a, b = comparison.first.model, comparison.second.model
    return (a.precision, b.precision) if a.name == b.name and a.precision != b.precision else ("first", "second")


def _summary(comparison: Comparison) -> list[str]:
    names = _names(comparison)
    models = [f"{side.model.name} in {side.model.precision}" for side in (comparison.first, comparison.second)]
    lines = [f"{name}: {model}" for name, model in zip(names, models, strict=True) if name not in model]
    if comparison.kl_bits is None:
        lines.append("The vocabularies differ, so tokens are compared by their text.")
    else:
        lines.append(f"KL divergence ({names[0]} ‖ {names[1]}): {comparison.kl_bits:.3g} bits.")
    return [*lines, f"Entropies: {comparison.first.entropy_bits:.2f} and {comparison.second.entropy_bits:.2f} bits."]
