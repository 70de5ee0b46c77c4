"""The logit lens: the top prediction after each layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from llama_scratch.render.page import Finding, Fold, Heatmap, Margin, Page, Paragraph, Window, written
from llama_scratch.render.scale import Scale
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.lens import Guess, Lens

_SOURCE = ("guesses", "norm")
# Falls of the rank that the finding names: maximum number, and minimum factor.
_FALLS, _LEAST_FALL = 2, 2.0


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
    return Page("Logit lens", (Finding(finding(lens)), _table(lens, first, ranks), Paragraph(note, "dim")), _SOURCE)


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


def finding(lens: Lens) -> str:
    """State where the final prediction takes the lead, and where its rank falls most."""
    answer, first, stays = lens.answers[-1], lens.first_layer(), lens.stays_from()
    leads = f"leads from {_name(stays)} on"
    if first != stays:
        leads = f"leads first after {_name(first)}, and from {_name(stays)} on at every layer"
    after = written(lens.tokens[-1].text, token=True)
    sentence = f"After {after}, {written(answer.text, token=True)} ({percent(answer.probability)}) {leads}."
    falls = [fall for fall in lens.rank_falls()[:_FALLS] if fall[1] >= _LEAST_FALL * fall[2]]
    places = " and ".join(f"{_name(layer)} ({before:,} → {now:,})" for layer, before, now in sorted(falls))
    return f"{sentence} Its rank falls most at {places}." if places else sentence


def _name(layer: int) -> str:
    return "the embedding" if layer < 0 else f"layer {layer}"


def _short(rank: int) -> str:
    """Format a rank with at most four characters: 7, 950, 1.2k, 31k."""
    return str(rank) if rank < 1000 else f"{rank / 1000:.1f}k" if rank < 9950 else f"{rank / 1000:.0f}k"


def _table(lens: Lens, first: int | None, ranks: bool) -> Heatmap:
    """Return the map of the layers, the last one at the top.

    Beside each layer is the rank of the final prediction at the last position.
    """
    layers = lens.layers[::-1]
    grid = [row.guesses for row in layers]
    worst = math.log(max(2, max(guess.rank_of_answer for row in grid for guess in row)))
    names, finals = ([written(token.text, token=True) for token in row] for row in (lens.tokens, lens.answers))
    answer, leads = len(lens.tokens) - 1, [[guess.rank_of_answer == 1 for guess in row] for row in grid]

    beside = tuple(f"{row[answer].rank_of_answer:,}" for row in grid)
    if ranks:
        scale = Scale(legend="rank of the final prediction, logarithmic", end_labels=(f"{math.exp(worst):,.0f}", "1"))
    else:
        scale = Scale(legend="probability of the top prediction", percent=True)

    def value(guess: Guess) -> float:
        return 1 - math.log(guess.rank_of_answer) / worst if ranks else guess.probability

    def hover(layer: int, index: int, guess: Guess) -> str:
        says = f"{written(guess.text, token=True)} ({percent(guess.probability)})"
        rank = f"the final prediction {finals[index]} has rank {guess.rank_of_answer:,}"
        return f"After {_name(layer)}, {names[index]} predicts {says}; {rank}."

    return Heatmap(
        title="Rank of the final prediction after each layer" if ranks else "Top prediction after each layer",
        rows=tuple("embed" if row.layer < 0 else f"L{row.layer}" for row in layers),
        columns=tuple(token.text for token in lens.tokens),
        values=tuple(tuple(map(value, row)) for row in grid),
        scale=scale,
        texts=tuple(tuple(_short(guess.rank_of_answer) if ranks else guess.text for guess in row) for row in grid),
        hovers=tuple(
            tuple(hover(row.layer, index, guess) for index, guess in enumerate(row.guesses)) for row in layers
        ),
        marked=tuple(tuple(c == answer and leading for c, leading in enumerate(row)) for row in leads),
        window=Window(
            None if first is None else first - lens.first,
            # Column numbers are positions only if the window starts at 0.
            "" if lens.first else "/lens ranks {}" if ranks else "/lens {}",
        ),
        margin=None if ranks else Margin(f"rank of {finals[-1]}", beside),
        fold=Fold(tuple(tuple(not leading for leading in row) for row in leads), "no final prediction"),
    )
