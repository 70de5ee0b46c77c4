"""What each layer would say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from llama_scratch.render.lines import json_line
from llama_scratch.render.page import Heatmap, Page, Paragraph
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.lens import Guess, Lens

_SOURCE = ("guesses", "norm")


def page(lens: Lens, first: int | None = None, *, ranks: bool = False) -> Page:
    """The guesses, or the ranks of the answers, and where the last position's answer comes from.

    first: the position that a narrow screen begins with, by default so that the last one is there.
    """
    note = (
        "Each row reads what stands behind a layer as the network reads the last one, through the final norm and the "
        "unembedding, as if it ended there: the logit lens. "
        + ("/lens shows the guesses." if ranks else "/lens ranks shows how far down the answer stands.")
    )
    shown = len(lens.tokens)
    if shown < lens.length:
        note += f" These are {shown} of {lens.length:,} positions, from {lens.first} on; /lens N begins at position N."
    return Page("Logit lens", (Paragraph(_where(lens)), _table(lens, first, ranks), Paragraph(note, "dim")), _SOURCE)


def growing(lens: Lens, note: str, rows: int, *, ranks: bool = False) -> Page:
    """The last of the layers that are there so far, and a line that says how far it is."""
    latest = replace(lens, layers=lens.layers[-rows:])
    note = f"{note} · each layer is an unembedding of every position"
    return Page("Logit lens", (_table(latest, None, ranks), Paragraph(note, "dim")))


def _where(lens: Lens) -> str:
    answer, stays = lens.answers[-1], lens.stays_from()
    if lens.first_layer() == stays:
        way = f"the best guess from {_name(stays)} on" + ("." if stays < 0 else ", and never before.")
    else:
        way = f"the best guess first behind {_name(lens.first_layer())}, and for good from {_name(stays)} on."
    said = f"{json_line(answer.text)}, {percent(answer.probability)}"
    return f"After {json_line(lens.tokens[-1].text)} comes {said}: {way}"


def _name(layer: int) -> str:
    return "the embedding" if layer < 0 else f"layer {layer}"


def _short(rank: int) -> str:
    """7, 950, 1.2k, 31k: at most four characters."""
    return str(rank) if rank < 1000 else f"{rank / 1000:.1f}k" if rank < 9950 else f"{rank / 1000:.0f}k"


def _table(lens: Lens, first: int | None, ranks: bool) -> Heatmap:
    grid = [row.guesses for row in lens.layers]
    worst = math.log(max(2, max(guess.rank_of_answer for row in grid for guess in row)))

    def value(guess: Guess) -> float:
        return 1 - math.log(guess.rank_of_answer) / worst if ranks else guess.probability

    def hover(layer: int, index: int, guess: Guess) -> str:
        after, answer = json_line(lens.tokens[index].text), json_line(lens.answers[index].text)
        said = f"{json_line(guess.text)} {percent(guess.probability)}"
        return f"{_name(layer)}, after {after}: {said}; the answer {answer} has rank {guess.rank_of_answer:,}"

    return Heatmap(
        title=(
            "The rank of what the network says in the end, behind each layer"
            if ranks
            else "The best guess behind each layer, shaded by its probability"
        ),
        rows=tuple("embed" if row.layer < 0 else f"L{row.layer}" for row in lens.layers),
        columns=tuple(token.text for token in lens.tokens),
        values=tuple(tuple(map(value, row)) for row in grid),
        texts=tuple(tuple(_short(guess.rank_of_answer) if ranks else guess.text for guess in row) for row in grid),
        hovers=tuple(
            tuple(hover(row.layer, index, guess) for index, guess in enumerate(row.guesses)) for row in lens.layers
        ),
        first=None if first is None else first - lens.first,
        # Columns are numbered from the first one that is there.
        more="" if lens.first else "/lens ranks {}" if ranks else "/lens {}",
    )
