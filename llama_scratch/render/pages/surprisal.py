"""A text colored by the surprisal of each token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Finding, Page, Paragraph, Running, Table, written
from llama_scratch.render.surprise import LIMITS, NAMES, surprise_style
from llama_scratch.render.text import counted, percent

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.surprisal import Scored, Surprisal

_EMPTY = Cell("")


def page(surprisal: Surprisal, text: str, bits: Sequence[float | None]) -> Page:
    """Return a page of the colored text, and the score of each token.

    Args:
        surprisal: The scores.
        text: The text.
        bits: Bits of each character of the text, from `per_character`.
    """
    runs = groupby(zip(text, bits, strict=True), key=lambda pair: pair[1])
    colored = [
        Cell(
            "".join(char for char, _ in run),
            surprise_style(of_run),
            token=True,
            hover="not predicted" if of_run is None else f"{of_run:.1f} bits",
        )
        for of_run, run in runs
    ]
    legend = [Cell("Bits: ", "dim")]
    for words, style in zip((*(f"under {limit:g}" for limit in LIMITS), "more"), NAMES, strict=True):
        legend += [Cell(words, style), Cell(" · ", "dim")]
    most_bits = max((token.bits or 0.0 for token in surprisal.tokens), default=0.0)
    table = Table(
        ("token", ">prob.", ">rank", ">bits", ""), tuple(_score(token, most_bits) for token in surprisal.tokens)
    )
    text_and_legend = (Running(tuple(cells), spoken=False) for cells in (colored, legend[:-1]))
    total = Paragraph(_total(surprisal), "dim")
    return Page("Surprisal", (Finding(finding(surprisal)), *text_and_legend, table, total))


def finding(surprisal: Surprisal) -> str:
    """Name the most surprising token and its share of the text's bits.

    A token stands out if it has at least twice the mean surprisal.
    """
    scored = [(token.bits, token) for token in surprisal.tokens if token.bits is not None]
    if not scored:
        return "No token is predicted: the text has no token before it."
    bits, token = max(scored, key=lambda pair: pair[0])
    total = f"{bits:.1f} of {surprisal.bits:.1f} bits, probability {percent(token.probability or 0.0)}"
    name = written(token.text, token=True)
    if len(scored) > 1 and bits >= 2 * surprisal.bits / len(scored):
        return f"{name} is the most surprising token: {total}."
    if len(scored) == 1:
        return f"{name} is the only predicted token: {total}."
    return f"No single token stands out. The most surprising is {name}: {total}."


def _score(token: Scored, most_bits: float) -> tuple[Cell, ...]:
    cell = Cell(token.text, surprise_style(token.bits), token=True)
    if token.probability is None or token.rank is None or token.bits is None:
        return cell, Cell("", said="not predicted"), _EMPTY, _EMPTY, _EMPTY
    bar = Cell("", bar=token.bits / (most_bits or 1.0))
    return cell, Cell(percent(token.probability)), Cell(f"{token.rank:,}"), Cell(f"{token.bits:.1f}"), bar


def _total(surprisal: Surprisal) -> str:
    if surprisal.perplexity is None:
        return "The first token is not predicted, so there is nothing to score."
    scored = sum(token.bits is not None for token in surprisal.tokens)
    return f"{surprisal.bits:.1f} bits for {counted(scored, 'token')}, perplexity {surprisal.perplexity:,.2f}."
