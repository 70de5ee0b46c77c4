"""Encode prompts, and reject texts far beyond the context early."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import dropwhile
from typing import Any

from llama_scratch.chat_format import ChatFormat, Message
from llama_scratch.errors import ContextLengthError
from llama_scratch.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""A text, to which the model's BOS token is prepended, or token ids, which are used unchanged."""

# Texts of up to this many characters are always tokenized completely. That takes at most half a second.
_TOKENIZED_IN_FULL = 1_000_000


def encode_text(tokenizer: Tokenizer, text: str, context: int, *, bos: bool, special: bool) -> list[int]:
    """Encode a text, see `LoadedModel.encode`.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        context: Maximum number of tokens.
        bos: Add the BOS token, if the model has one.
        special: Parse special tokens.

    Raises:
        ContextLengthError: If a long text has more tokens than the context.
    """
    limit = _token_limit(tokenizer, context, len(text))
    ids = tokenizer.encode(text, bos=bos, special=special, limit=limit)
    if limit is not None and len(ids) > limit:
        raise _too_long(context, len(text))
    return ids


def encode_conversation(tokenizer: Tokenizer, chat: ChatFormat, messages: Sequence[Message], context: int) -> list[int]:
    """Encode a conversation up to the start of the answer, see `Llama.encode_chat`.

    Args:
        tokenizer: The tokenizer.
        chat: The chat format.
        messages: The conversation.
        context: Maximum number of tokens.

    Raises:
        ContextLengthError: If a long conversation has more tokens than the context.
    """
    _token_limit(tokenizer, context, sum(len(message.content) for message in messages))
    parts = chat.parts(messages)
    size = sum(len(part.text) for part in parts)
    limit = _token_limit(tokenizer, context, size)
    ids: list[int] = []
    for part in parts:
        id = tokenizer.special_tokens.get(part.text) if part.special else None
        ids += [id] if id is not None else tokenizer.encode(part.text, special=part.special, limit=limit)
        if limit is not None and len(ids) > limit:
            raise _too_long(context, size)
    # Some templates add the BOS token, others leave it to the tokenizer.
    bos = tokenizer.bos_id
    return [*([] if bos is None else [bos]), *dropwhile(lambda id: id == bos, ids)]


def whole_number(value: Any) -> int | None:
    """Convert any integer, such as NumPy's, to int. Return None for all other values."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _token_limit(tokenizer: Tokenizer, context: int, size: int) -> int | None:
    """Return the number of ids after which `encode` can stop, or None for a short text.

    Raises `ContextLengthError` if `size` characters cannot fit into the context.
    """
    if size <= _TOKENIZED_IN_FULL:
        return None
    if size > context * tokenizer.max_token_bytes:  # no token has more characters than bytes
        raise _too_long(context, size)
    return context


def _too_long(context: int, size: int) -> ContextLengthError:
    return ContextLengthError(
        f"The text has {size:,} characters, which do not fit into the context of {context:,} tokens. "
        "Shorten it, or raise `context` if the model allows it."
    )
