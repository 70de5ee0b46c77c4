"""A prompt → token ids. A text far longer than the context is rejected before all of it is tokenized."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import dropwhile
from typing import Any

from llama_scratch.chat_format import ChatFormat, Message
from llama_scratch.errors import ContextLengthError
from llama_scratch.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""A text, which gets the beginning-of-text token if the model wants one, or token ids, which do not."""

# Texts of up to so many characters are tokenized to the end, in half a second at most, whatever the context.
_TOKENIZED_IN_FULL = 1_000_000


def encode_text(tokenizer: Tokenizer, text: str, context: int, *, bos: bool, special: bool) -> list[int]:
    """The ids of a text, see `LoadedModel.encode`."""
    limit = _token_limit(tokenizer, context, len(text))
    ids = tokenizer.encode(text, bos=bos, special=special, limit=limit)
    if limit is not None and len(ids) > limit:
        raise _too_long(context, len(text))
    return ids


def encode_conversation(tokenizer: Tokenizer, chat: ChatFormat, messages: Sequence[Message], context: int) -> list[int]:
    """The ids of a conversation up to where its answer begins, see `Llama.encode_chat`."""
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
    # Some templates write the beginning of the text and some leave it to the tokenizer.
    bos = tokenizer.bos_id
    return [*([] if bos is None else [bos]), *dropwhile(lambda id: id == bos, ids)]


def whole_number(value: Any) -> int | None:
    """A whole number of any type (NumPy's and torch's too) as Python's; None for anything else, True and False too."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _token_limit(tokenizer: Tokenizer, context: int, size: int) -> int | None:
    """The number of tokens after which a text of `size` characters need not be tokenized further; None if it is short.

    Raises `ContextLengthError` if so many characters cannot fit into the context.
    """
    if size <= _TOKENIZED_IN_FULL:
        return None
    if size > context * tokenizer.max_token_bytes:  # no token has more characters than bytes
        raise _too_long(context, size)
    return context


def _too_long(context: int, size: int) -> ContextLengthError:
    return ContextLengthError(
        f"The text has {size:,} characters, which are more than the {context:,} tokens of the context. "
        "Shorten it, or raise `context` if the model allows it."
    )
