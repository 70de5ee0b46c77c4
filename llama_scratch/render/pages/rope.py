"""The rotary position embedding."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from llama_scratch.render.drawings.dials import Dials, arrow, degrees
from llama_scratch.render.page import Cell, Finding, Page, Paragraph, Running, Table

if TYPE_CHECKING:  # they import torch
    from llama_scratch.microscope.rope import Rope

_SOURCE = ("rope",)
# Maximum number of rows of the query and of the keys on a terminal.
_SHOWN = 10


def page(rope: Rope) -> Page:
    """Return a page of the angles, the rotated query, and its attention scores."""
    kinds = Counter(dial.kind for dial in rope.dials)
    counts = (
        f"of {len(rope.dials)} pairs {kinds['kept']} kept, {kinds['smoothed']} smoothed, {kinds['divided']} divided"
    )
    if rope.scales:
        own = f"This network uses RoPE scaling with a factor of {rope.factor:g} (columns with ′)"
    else:
        own = (
            "This network does not use RoPE scaling (columns without ′). The columns with ′ show a scaling factor of "
            f"{rope.factor:g} for comparison, as in Llama 3.2 1B and 3B"
        )
    return Page(
        "Rotary position embedding (RoPE)",
        (
            Finding(finding(rope)),
            _hands(rope),
            Paragraph(f"{own}: {counts}."),
            _dials(rope),
            Paragraph(
                "λ: wavelength in tokens. angle: rotation of the pair, from → counterclockwise. "
                f"θ is {rope.theta:,.0f}^(−j/{len(rope.dials)}) radians per token for pair j, and λ is 2π/θ.",
                "dim",
            ),
            *_query(rope),
            *_keys(rope),
        ),
        _SOURCE,
    )


def finding(rope: Rope) -> str:
    """State which pairs make less than one turn over the context, and the scaling."""
    count, context = len(rope.dials), f"the {rope.context:,} tokens of the context"
    if rope.slow_from is None:
        sentence = f"Each of the {count} pairs turns at least once over {context}."
    elif rope.slow_from == 0:
        sentence = f"None of the {count} pairs turns once over {context}."
    else:
        sentence = f"From pair {rope.slow_from} of {count} on, the rotation is slower than one turn over {context}."
    if rope.scales:
        kinds = Counter(dial.kind for dial in rope.dials)
        sentence += f" RoPE scaling slows {count - kinds['kept']} pairs, {kinds['divided']} of them by {rope.factor:g}."
    return sentence


def _hands(rope: Rope) -> Dials:
    far = f"{rope.context - 1:,} is the last position of the context"
    return Dials(
        f"The angle of each pair at {len(rope.hands)} positions; {far}",
        tuple(hands.position for hands in rope.hands),
        tuple(hands.angles for hands in rope.hands),
        "pair",
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
    columns = (">j", ">λ", ">angle", ">λ′", ">angle′", "")
    return Table(columns, rows, f"Angles at position {rope.position:,}; ′: with a scaling factor of {rope.factor:g}")


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
        Cell(f"Query of L{rope.layer}.H{rope.head} at "),
        Cell(rope.token.text, "cyan", token=True),
        Cell(f", rotated to position {rope.position:,}. Its norm is {rope.length:.4g}; rotation preserves norms."),
    )
    return Running(heading), Table((">j", ">before", ">after", ">norm"), rows, "Its pairs, by norm", scroll=_SHOWN)


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
    note = "score: q·k/√head_dim, the input of the softmax. unrotated: the same without RoPE, for any distance."
    if rope.n_keys > len(rope.matches):
        note = f"The {len(rope.matches)} nearest of {rope.n_keys:,} keys. {note}"
    title = "Attention scores at its own position"
    return Table((">distance", "key", ">unrotated", ">score"), rows, title, scroll=_SHOWN), Paragraph(note, "dim")


def _dial(angle: float) -> str:
    """Format an angle as degrees with one of eight arrows."""
    return f"{degrees(angle)}°{arrow(angle)}"


def _tokens(wavelength: float) -> str:
    """Format a number of tokens with four characters."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        # Values that would round to 1000 get the next unit.
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
