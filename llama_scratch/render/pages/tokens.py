"""Tokenization of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Finding, Page, Running, Table
from llama_scratch.render.text import counted

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.tokens import Tokens

# Styles of adjacent tokens, which also differ without color.
_ALTERNATING = ("cyan", "underline magenta")


def page(tokens: Tokens) -> Page:
    """Return a page of the tokenized text, and the id, bytes and text of each token."""
    pieces = [
        Cell(piece.text, _ALTERNATING[i % 2], token=True, hover=f"{piece.id}: {piece.bytes.hex(' ')}")
        for i, piece in enumerate(tokens.tokens)
    ]
    rows = [
        (Cell(str(piece.id)), Cell(piece.bytes.hex(" ")), Cell(piece.text, _ALTERNATING[i % 2], token=True))
        for i, piece in enumerate(tokens.tokens)
    ]
    table = Table((">id", "bytes", "text"), tuple(rows))
    return Page("Tokens", (Finding(finding(tokens)), Running(tuple(pieces), spoken=False), table))


def finding(tokens: Tokens) -> str:
    """Count the tokens, and the bytes that they decode to."""
    n_bytes = sum(len(piece.bytes) for piece in tokens.tokens)
    return f"{counted(len(tokens.tokens), 'token')} for {counted(n_bytes, 'byte')}."
