"""Source code by name, and the list of concepts."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import dedent
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Code, Page, Paragraph, Table

if TYPE_CHECKING:
    from llama_scratch.microscope.source import Passage, Source


def page(source: Source) -> Page:
    """Return a page of the passages."""
    codes = tuple(
        Code(dedent(passage.text), passage.path, passage.first_line, file=passage.file) for passage in source.passages
    )
    return Page(f"Source of {source.name}", codes)


def contents(concepts: Mapping[str, tuple[Passage, ...]]) -> Page:
    """Return a page of the concepts and their locations."""
    rows = tuple(
        (Cell(concept, "bold"), Cell(passage.name), Cell(f"{passage.path.partition('/')[2]}:{passage.first_line}"))
        for concept, passages in concepts.items()
        for passage in passages[:1]
    )
    note = (
        "/source NAME shows one of these, or any function, class, method, module or command: "
        "/source KVCache.update, /source model, /source /surprisal."
    )
    return Page("Source", (Table(("concept", "name", "location"), rows), Paragraph(note, "dim")))
