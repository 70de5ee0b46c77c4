"""How a text is cut into tokens."""

from __future__ import annotations

from dataclasses import dataclass

from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.inference.prompt_text import Prompt
from llama_scratch.results import JsonResult, Token


@dataclass(frozen=True)
class Piece(Token):
    """A token with the bytes that it stands for."""

    bytes: bytes


@dataclass(frozen=True)
class Tokens(JsonResult):
    """The tokens of a text in order, the beginning-of-text token included."""

    tokens: tuple[Piece, ...]


def tokens(llama: LoadedModel, prompt: Prompt) -> Tokens:
    """The tokens of a prompt. Raises `UsageError` for an id that is none."""
    ids = llama.encode(prompt)
    return Tokens(tuple(Piece(id, llama.token(id).text, llama.tokenizer.token_bytes(id)) for id in ids))
