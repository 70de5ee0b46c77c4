"""A tree of probable continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llama_scratch.render.lines import json_line
from llama_scratch.render.page import Cell, Page, Running, Table
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.tree import Branch, Tree

_EMPTY = Cell("")


def page(tree: Tree, text: str) -> Page:
    """Return a page of the branches with token and path probabilities.

    Args:
        tree: The tree.
        text: The prompt. Its end is shown.
    """
    end = text[-24:]
    levels, rows = zip(*_branches(tree.branches, ""), strict=True)
    columns = "branch", "token", ">probability", ">path", ""
    table = Table(columns, rows, json_line(end if end == text else f"…{end}"), levels=levels)
    note = Cell("In parentheses: probability of the whole path. /tree 1.2 moves there, /tree .. moves back.", "dim")
    return Page("Continuation tree", (table, Running((note,), spoken=False)))


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
