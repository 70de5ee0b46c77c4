"""The rotary embedding as dials."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, Paragraph, Running, Table

if TYPE_CHECKING:  # they bring torch
    from llama_scratch.microscope.rope import Rope

_SOURCE = ("rope",)
_ARROWS = "→↗↑↖←↙↓↘"
# Rows that a terminal shows of the query and of the keys.
_SHOWN = 10


def page(rope: Rope) -> Page:
    """The dials, then the query before and after its turn, then its products with the keys."""
    kinds = Counter(dial.kind for dial in rope.dials)
    counts = (
        f"of {len(rope.dials)} pairs {kinds['kept']} kept, {kinds['smoothed']} smoothed, {kinds['divided']} divided"
    )
    if rope.scales:
        own = f"This network slows its slow pairs down by {rope.factor:g}, and of them its dials are those with a ′"
    else:
        own = (
            "This network does not scale its rotary embedding, so its dials are those without a ′; beside them stands "
            f"what a factor of {rope.factor:g} would make of them, that of Llama 3.2's 1B and 3B"
        )
    return Page(
        "Rotary embedding",
        (
            Paragraph(f"{own}: {counts}."),
            _dials(rope),
            Paragraph(
                "λ: tokens to a full turn. dial: where the pair stands, from → counterclockwise. "
                f"θ is {rope.theta:,.0f}^(−j/{len(rope.dials)}) radians a token for pair j, and λ is 2π/θ.",
                "dim",
            ),
            *_query(rope),
            *_keys(rope),
        ),
        _SOURCE,
    )


def _dials(rope: Rope) -> Table:
    rows = tuple(
        (
            Cell(f"{dial.pair}", "dim"),
            Cell(_tokens(dial.unscaled_wavelength)),
            Cell(_dial(dial.unscaled_angle)),
            Cell(_tokens(dial.scaled_wavelength)),
            Cell(_dial(dial.scaled_angle)),
            Cell(dial.kind, "" if dial.kind == "kept" else "cyan" if dial.kind == "smoothed" else "magenta"),
        )
        for dial in rope.dials
    )
    columns = (">j", ">λ", ">dial", ">λ′", ">dial′", "")
    return Table(columns, rows, f"Dials at position {rope.position:,}; ′: with the factor {rope.factor:g}")


def _query(rope: Rope) -> tuple[Running, Table]:
    largest = max(pair.length for pair in rope.query) or 1.0
    longest = sorted(rope.query, key=lambda pair: -pair.length)
    rows = tuple(
        (
            Cell(f"{pair.pair}", "dim"),
            Cell(_dial(pair.before)),
            Cell(_dial(pair.after)),
            Cell(f"{pair.length:.2f}", bar=pair.length / largest),
        )
        for pair in longest
    )
    heading = (
        Cell(f"The query of L{rope.layer}.H{rope.head} behind "),
        Cell(rope.token.text, "cyan", token=True),
        Cell(f", turned to position {rope.position:,}: its length {rope.length:.4g} stays, as that of each pair."),
    )
    return Running(heading), Table((">j", ">before", ">after", ">length"), rows, "Its longest pairs", scroll=_SHOWN)


def _keys(rope: Rope) -> tuple[Table, Paragraph]:
    largest = max(abs(match.product) for match in rope.matches) or 1.0
    rows = tuple(
        (
            Cell(f"{match.distance:,}"),
            Cell(match.token.text, token=True),
            Cell(f"{match.unturned:.2f}"),
            Cell(f"{match.product:.2f}", bar=match.product / largest),
        )
        for match in rope.matches
    )
    note = "q·k/√head_dim, which the softmax makes shares of. What it differs from unturned by, the distance did."
    if rope.n_keys > len(rope.matches):
        note = f"The {len(rope.matches)} nearest of {rope.n_keys:,} keys. {note}"
    title = "The query at its own place meets the keys"
    return Table((">back", "key", ">unturned", ">product"), rows, title, scroll=_SHOWN), Paragraph(note, "dim")


def _dial(angle: float) -> str:
    """An angle in radians as degrees with an arrow, of which there are eight."""
    degrees = round(math.degrees(angle)) % 360
    return f"{degrees}°{_ARROWS[round(degrees / 45) % 8]}"


def _tokens(wavelength: float) -> str:
    """A number of tokens in four characters."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        # What rounds up to a thousand has the next unit.
        if wavelength >= 0.9995 * size:
            value = wavelength / size
            return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"
    return (
        f"{wavelength:.2f}"
        if wavelength < 9.995
        else f"{wavelength:.1f}"
        if wavelength < 99.95
        else f"{wavelength:.0f}"
    )
