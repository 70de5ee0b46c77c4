"""Two texts: where the predictions after them differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, Paragraph, Table
from llama_scratch.render.text import counted, percent, visible
from llama_scratch.results import Token

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.diff import Diff

_EMPTY = Cell("")


def page(diff: Diff) -> Page:
    """Both texts in one column, -/+ where they differ, with the divergence and both predictions after each token."""
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
        Table(("", "token", ">bits", "first", "second", ""), tuple(_rows(diff))),
        Table(("after the first", ">", "after the second", ">"), tuple(after)),
    )
    return Page("Two texts", (*tables, Paragraph("\n".join(_summary(diff)))))


def _rows(diff: Diff) -> Iterator[tuple[Cell, ...]]:
    """Tokens in order: those of the first text alone, those of the second alone, and those of both with the
    divergence and the predictions after them. A number stands for so many at the beginning that are alike."""
    i = j = max(0, diff.shared - 1)
    if i:
        alike = f"{counted(i, 'token')} alike"
        yield _EMPTY, Cell(alike, "dim", said=alike), *4 * [_EMPTY]
    for pair in diff.pairs[i:]:
        yield from _apart(diff.first[i : pair.first], diff.second[j : pair.second])
        best, other, bits = pair.first_next, pair.second_next, f"{pair.jsd_bits:.2f}"
        yield (
            Cell("", said="in both"),
            Cell(pair.token.text, token=True),
            Cell(bits),
            Cell(best.text, token=True),
            Cell("same", "dim") if best.id == other.id else Cell(other.text, "bold", token=True),
            Cell("", bar=pair.jsd_bits, hover=f"{bits} bits"),
        )
        i, j = pair.first + 1, pair.second + 1
    yield from _apart(diff.first[i:], diff.second[j:])


def _apart(first: Sequence[Token], second: Sequence[Token]) -> Iterator[tuple[Cell, ...]]:
    sides = (first, "-", "red", "only in the first"), (second, "+", "green", "only in the second")
    for tokens, mark, style, said in sides:
        for token in tokens:
            yield Cell(mark, style, said=said), Cell(token.text, style, token=True), *4 * [_EMPTY]


def _summary(diff: Diff) -> list[str]:
    lines = []
    if pair := diff.parting:
        best, other = visible(pair.first_next.text).plain, visible(pair.second_next.text).plain
        lines.append(f"The predictions part after {visible(pair.token.text).plain}: {best} and {other}.")
    return [*lines, f"At the end they are {diff.jsd_bits:.2f} bits apart (0: the same, 1: nothing in common)."]
