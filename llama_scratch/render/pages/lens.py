"""The logit lens: the top prediction after each layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from llama_scratch.render.lines import json_line
from llama_scratch.render.page import Finding, Heatmap, Page, Paragraph
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.lens import Guess, Lens

_SOURCE = ("guesses", "norm")


def page(lens: Lens, first: int | None = None, *, ranks: bool = False) -> Page:
    """Return a page of the top predictions, or of the ranks of the final predictions.

    Args:
        lens: The lens.
        first: The first position on a narrow screen. By default the last position is shown.
        ranks: Show ranks instead of tokens.
    """
    note = "Each row is the residual stream after a layer, read through the final norm and the unembedding. " + (
        "/lens shows the top predictions." if ranks else "/lens ranks shows the rank of the final prediction."
    )
    shown = len(lens.tokens)
    if shown < lens.length:
        note += f" Shown: {shown} of {lens.length:,} positions, from {lens.first} on. /lens N starts at position N."
    return Page("Logit lens", (Finding(_where(lens)), _table(lens, first, ranks), Paragraph(note, "dim")), _SOURCE)


def growing(lens: Lens, note: str, rows: int, *, ranks: bool = False) -> Page:
    """Return a page of the layers so far, with a line about the progress.

    Args:
        lens: The lens so far.
        note: The progress.
        rows: Maximum number of layers.
        ranks: Show ranks instead of tokens.
    """
    latest = replace(lens, layers=lens.layers[-rows:])
    note = f"{note} · each layer is an unembedding of every position"
    return Page("Logit lens", (_table(latest, None, ranks), Paragraph(note, "dim")))


def _where(lens: Lens) -> str:
    answer, stays = lens.answers[-1], lens.stays_from()
    if lens.first_layer() == stays:
        way = f"rank 1 from {_name(stays)} on" + ("." if stays < 0 else ", and never before.")
    else:
        way = f"rank 1 first after {_name(lens.first_layer())}, and always from {_name(stays)} on."
    said = f"{json_line(answer.text)}, {percent(answer.probability)}"
    return f"Prediction after {json_line(lens.tokens[-1].text)}: {said}; {way}"


def _name(layer: int) -> str:
    return "the embedding" if layer < 0 else f"layer {layer}"


def _short(rank: int) -> str:
    """Format a rank with at most four characters: 7, 950, 1.2k, 31k."""
    return str(rank) if rank < 1000 else f"{rank / 1000:.1f}k" if rank < 9950 else f"{rank / 1000:.0f}k"


def _table(lens: Lens, first: int | None, ranks: bool) -> Heatmap:
    grid = [row.guesses for row in lens.layers]
    worst = math.log(max(2, max(guess.rank_of_answer for row in grid for guess in row)))

    def value(guess: Guess) -> float:
        return 1 - math.log(guess.rank_of_answer) / worst if ranks else guess.probability

    def hover(layer: int, index: int, guess: Guess) -> str:
        after, answer = json_line(lens.tokens[index].text), json_line(lens.answers[index].text)
        said = f"{json_line(guess.text)} {percent(guess.probability)}"
        return f"{_name(layer)}, after {after}: {said}; the final prediction {answer} has rank {guess.rank_of_answer:,}"

    return Heatmap(
        title=(
            "Rank of the final prediction after each layer"
            if ranks
            else "Top prediction after each layer, shaded by its probability"
        ),
        rows=tuple("embed" if row.layer < 0 else f"L{row.layer}" for row in lens.layers),
        columns=tuple(token.text for token in lens.tokens),
        values=tuple(tuple(map(value, row)) for row in grid),
        texts=tuple(tuple(_short(guess.rank_of_answer) if ranks else guess.text for guess in row) for row in grid),
        hovers=tuple(
            tuple(hover(row.layer, index, guess) for index, guess in enumerate(row.guesses)) for row in lens.layers
        ),
        first=None if first is None else first - lens.first,
        # Column numbers are positions only if the window starts at 0.
        more="" if lens.first else "/lens ranks {}" if ranks else "/lens {}",
    )
