"""A tree of probable continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llama_scratch.render.drawings.icicle import Icicle, Slice
from llama_scratch.render.lines import json_line
from llama_scratch.render.page import Cell, Finding, Page, Running, Table, written
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.tree import Branch, Tree

_EMPTY = Cell("")


def page(tree: Tree, text: str) -> Page:
    """Return a page with an icicle of the branches, and a list of all of them.

    Args:
        tree: The tree.
        text: The prompt. Its end is shown.
    """
    end = text[-24:]
    shown = end if end == text else f"…{end}"
    root = Slice("", written(shown, token=True), 1.0, tuple(_slices(tree.branches, "")))
    levels, rows = zip(*_branches(tree.branches, ""), strict=True)
    columns = "branch", "token", ">probability", ">path", ""
    table = Table(columns, rows, json_line(shown), levels=levels)
    note = Cell("In parentheses: probability of the whole path. /tree 1.2 moves there, /tree .. moves back.", "dim")
    icicle = Icicle("Width: probability of the whole path. Empty: all other tokens", root)
    return Page("Continuation tree", (Finding(finding(tree)), icicle, table, Running((note,), spoken=False)))


def finding(tree: Tree) -> str:
    """State the most probable path, and how much of the probability the tree shows."""
    first, best = tree.branches[0], max(_paths(tree.branches, ()), key=lambda path: path[-1].path_probability)
    sentence = f"{written(first.text, token=True)} is the most probable next token, {percent(first.probability)}"
    if len(best) > 1:
        tokens = " ".join(written(branch.text, token=True) for branch in best)
        length = f"all {len(best)} tokens" if len(best) == tree.depth else f"{len(best)} tokens"
        sentence += (
            f"; the most probable path of the tree is {tokens}, {percent(best[-1].path_probability)} for {length}"
        )
    count = len(tree.branches)
    if count > 1:
        share = percent(min(1.0, sum(branch.probability for branch in tree.branches)))
        sentence += f". Its {count} first tokens have {share} of the probability"
    return sentence + "."


def _paths(branches: Sequence[Branch], before: tuple[Branch, ...]) -> Iterator[tuple[Branch, ...]]:
    """Yield each path from a first token to a leaf."""
    for branch in branches:
        path = (*before, branch)
        if branch.children:
            yield from _paths(branch.children, path)
        else:
            yield path


def _slices(branches: Sequence[Branch], path: str) -> Iterator[Slice]:
    """Yield the branches of the icicle below a path."""
    for number, branch in enumerate(branches, start=1):
        name = f"{path}{number}"
        children = tuple(_slices(branch.children, f"{name}."))
        yield Slice(name, written(branch.text, token=True), branch.path_probability, children, branch.stop)


def _branches(branches: Sequence[Branch], path: str) -> Iterator[tuple[int, tuple[Cell, ...]]]:
    """Yield the rows of the branches below a path, each with its level."""
    for number, branch in enumerate(branches, start=1):
        whole = percent(branch.path_probability)
        yield (
            path.count("."),
            (
                Cell(f"{path}{number}", "dim"),
                Cell(branch.text, "bold", token=True),
                Cell(percent(branch.probability)),
                Cell(f"({whole})", "dim", said=f"path {whole}") if path else _EMPTY,
                Cell(
                    "end" if branch.stop else "",
                    "dim",
                    bar=branch.path_probability,
                    said="the text ends" if branch.stop else "",
                ),
            ),
        )
        yield from _branches(branch.children, f"{path}{number}.")
