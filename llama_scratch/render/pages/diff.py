"""Predictions along two texts, aligned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Finding, Page, Paragraph, Table, written
from llama_scratch.render.text import counted, percent
from llama_scratch.results import Token

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.diff import Diff

_EMPTY = Cell("")


def page(diff: Diff) -> Page:
    """Return a page of the aligned texts with their divergence and both predictions."""
    after = [
        (
            Cell(first.text, token=True),
            Cell(percent(first.probability)),
            Cell(second.text, token=True),
            Cell(percent(second.probability)),
        )
        for first, second in zip(diff.first_top, diff.second_top, strict=True)
    ]
    tables = (
        Table(("", "token", ">JSD", "first", "second", ""), tuple(_rows(diff))),
        Table(("after the first", ">", "after the second", ">"), tuple(after)),
    )
    note = "JSD: Jensen–Shannon divergence of the two predictions in bits; 0: equal, 1: disjoint."
    return Page("Two texts", (Finding(finding(diff)), *tables, Paragraph(note, "dim")))


def finding(diff: Diff) -> str:
    """State both predictions, their divergence, and where they first differ."""
    first, second = diff.first_top[0], diff.second_top[0]
    one, other = percent(first.probability), percent(second.probability)
    distance = f"The predictions diverge by {diff.jsd_bits:.2f} of at most 1 bit"
    if not diff.jsd_bits:
        distance = "The predictions are equal"
    if first.id == second.id:
        sentence = f"{written(first.text, token=True)} follows both texts ({one} and {other}). {distance}"
    else:
        sentence = (
            f"{written(first.text, token=True)} ({one}) follows the first text, {written(second.text, token=True)} "
            f"({other}) the second. {distance}"
        )
    if (pair := diff.parting) is None:
        return f"{sentence}."
    best, then = (written(each.text, token=True) for each in (pair.first_next, pair.second_next))
    here = written(pair.token.text, token=True)
    return f"{sentence}, and the top predictions first differ after {here}: {best} and {then}."


def _rows(diff: Diff) -> Iterator[tuple[Cell, ...]]:
    """Yield the rows of the aligned texts.

    The common prefix is one row with its length. Between two shared tokens, tokens only in the first text come before
    tokens only in the second. Rows of shared tokens have the divergence and the predictions after them.
    """
    i = j = max(0, diff.shared - 1)
    if i:
        alike = f"{counted(i, 'token')} shared"
        yield _EMPTY, Cell(alike, "dim", said=alike), *4 * [_EMPTY]
    for pair in diff.pairs[i:]:
        yield from _apart(diff.first[i : pair.first], diff.second[j : pair.second])
        name = written(pair.token.text, token=True)
        best, other, bits = pair.first_next, pair.second_next, f"{pair.jsd_bits:.2f}"
        yield (
            Cell("", said="in both"),
            Cell(pair.token.text, token=True),
            Cell(bits),
            Cell(best.text, token=True),
            Cell("same", "dim") if best.id == other.id else Cell(other.text, "bold", token=True),
            Cell("", bar=pair.jsd_bits, hover=f"After {name}, the predictions diverge by {bits} bits"),
        )
        i, j = pair.first + 1, pair.second + 1
    yield from _apart(diff.first[i:], diff.second[j:])


def _apart(first: Sequence[Token], second: Sequence[Token]) -> Iterator[tuple[Cell, ...]]:
    sides = (first, "-", "red", "only in the first"), (second, "+", "green", "only in the second")
    for tokens, mark, style, said in sides:
        for token in tokens:
            yield Cell(mark, style, said=said), Cell(token.text, style, token=True), *4 * [_EMPTY]
