"""What may come next, as a tree."""

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
    """The branches with their numbers, each one's probability and that of the whole path to it.

    text: that of the prompt, of which the end is shown.
    """
    end = text[-24:]
    levels, rows = zip(*_branches(tree.branches, ""), strict=True)
    columns = "branch", "token", ">probability", ">path", ""
    table = Table(columns, rows, json_line(end if end == text else f"…{end}"), levels=levels)
    note = Cell("In brackets: the whole path. /tree 1.2 goes there, /tree .. goes back.", "dim")
    return Page("What may come next", (table, Running((note,), spoken=False)))


def _branches(branches: Sequence[Branch], path: str) -> Iterator[tuple[int, tuple[Cell, ...]]]:
    """The rows of the branches behind a path, each with its level."""
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
