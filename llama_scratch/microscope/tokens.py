"""How a text is cut into tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.inference.prompt_text import Prompt
from llama_scratch.results import Token


@dataclass(frozen=True)
class Piece(Token):
    """A token with the bytes that it stands for."""

    bytes: bytes

    def as_json(self) -> dict[str, Any]:
        """The bytes as hexadecimal digits."""
        return {"id": self.id, "text": self.text, "bytes": self.bytes.hex()}


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text in order, the beginning-of-text token included."""

    tokens: tuple[Piece, ...]

    def as_json(self) -> dict[str, Any]:
        """As `/tokens` prints it."""
        return {"tokens": [piece.as_json() for piece in self.tokens]}


def tokens(llama: LoadedModel, prompt: Prompt) -> Tokens:
    """The tokens of a prompt. Raises `UsageError` for an id that is none."""
    ids = llama.encode(prompt)
    return Tokens(tuple(Piece(id, llama.token(id).text, llama.tokenizer.token_bytes(id)) for id in ids))
