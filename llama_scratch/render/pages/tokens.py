"""How a text is cut into tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, Paragraph, Running, Table
from llama_scratch.render.text import counted

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.tokens import Tokens

# Neighbors differ without colors too.
_ALTERNATING = ("cyan", "underline magenta")


def page(tokens: Tokens) -> Page:
    """The text cut into its tokens, then each one's id, bytes and text."""
    pieces = [
        Cell(piece.text, _ALTERNATING[i % 2], token=True, hover=f"{piece.id}: {piece.bytes.hex(' ')}")
        for i, piece in enumerate(tokens.tokens)
    ]
    rows = [
        (Cell(str(piece.id)), Cell(piece.bytes.hex(" ")), Cell(piece.text, _ALTERNATING[i % 2], token=True))
        for i, piece in enumerate(tokens.tokens)
    ]
    count = Paragraph(counted(len(tokens.tokens), "token") + ".", "dim")
    return Page("Tokens", (Running(tuple(pieces), spoken=False), Table((">id", "bytes", "text"), tuple(rows)), count))
