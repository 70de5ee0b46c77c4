"""Tokenization of a text."""

from __future__ import annotations

from dataclasses import dataclass

from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.inference.prompt_text import Prompt
from llama_scratch.results import JsonResult, Token


@dataclass(frozen=True)
class Piece(Token):
    """A token with its bytes.

    Attributes:
        bytes: The bytes that it encodes.
    """

    bytes: bytes


@dataclass(frozen=True)
class Tokens(JsonResult):
    """The tokens of a text in order, including the beginning-of-text token."""

    tokens: tuple[Piece, ...]


def tokens(llama: LoadedModel, prompt: Prompt) -> Tokens:
    """Tokenize a prompt.

    Args:
        llama: The model.
        prompt: The prompt.

    Raises:
        UsageError: If an id does not exist.
    """
    ids = llama.encode(prompt)
    return Tokens(tuple(Piece(id, llama.token(id).text, llama.tokenizer.token_bytes(id)) for id in ids))
