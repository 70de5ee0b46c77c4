"""The tokenizer and the chat template in a GGUF file's metadata."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llama_scratch.chat_format import ChatFormat, TemplateFormat
from llama_scratch.checkpoint.byte_level_bpe import (
    BEGIN_WITH_BOS,
    CONTROL,
    PATTERNS,
    PRE_TOKENIZERS,
    STOPS,
    check_counts,
    check_merges,
    guess_pre_tokenizer,
    is_hidden_control,
    is_reachable,
    ranks_of,
    unmergeable,
)
from llama_scratch.checkpoint.extras import Extras
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, sanitize
from llama_scratch.tokenizer import Tokenizer, replace_surrogates

# GGUF's token types.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_MERGES = "tokenizer.ggml.merges"
_TOKEN_ID = re.compile(r"tokenizer\.ggml\.(\w+)_token_id")
# Maximum number of tokens named in a warning.
_MAX_NAMED = 3


def read_tokenizer(metadata: dict[str, Any]) -> tuple[Tokenizer, Extras, tuple[str, ...]]:
    """Read the tokenizer, the `Extras` about it, and warnings.

    Raises:
        CheckpointError: If the metadata is damaged, or the tokenizer is of another kind.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or not isinstance(pre, str) or not (pre == "default" or pre in PRE_TOKENIZERS):
        raise CheckpointError(
            f"the tokenizer is '{sanitize(kind)}' with the pattern '{sanitize(pre)}', expected 'gpt2' with "
            f"{' or '.join(map(repr, PATTERNS))}. Pass a tokenizer.model as `tokenizer`, or use another file."
        )
    vocabulary = _read_vocabulary(metadata)
    warnings = [_retyped_warning(vocabulary)] if vocabulary.retyped else []
    if pre == "default":
        guess = guess_pre_tokenizer(vocabulary.special, vocabulary.tokenizer)
        if guess is None:
            raise CheckpointError(
                "it does not name its pre-tokenizer (tokenizer.ggml.pre), and its vocabulary does not fit a known one. "
                "Pass a tokenizer.model as `tokenizer`, or use another file."
            )
        pre = guess
        warnings.append(
            f"The file does not name its pre-tokenizer (tokenizer.ggml.pre). Judging by its vocabulary, it is '{pre}'. "
            "Use a newer file of this model if its answers are poor."
        )
    bos = vocabulary.name_of("bos")
    if metadata.get("tokenizer.ggml.add_bos_token", pre in BEGIN_WITH_BOS) is not True:  # as in llama.cpp
        bos = None
    tokenizer = vocabulary.tokenizer(PATTERNS[PRE_TOKENIZERS[pre]], bos, whole=pre in BEGIN_WITH_BOS)
    return tokenizer, Extras(roles=vocabulary.roles, token_types=tuple(vocabulary.types)), tuple(warnings)


# --- Vocabulary -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a file, grouped by how they are matched in text.

    Attributes:
        texts: Id → text.
        types: Id → GGUF's type of the token.
        merges: Merges, highest priority first.
        roles: Role → id, see `Extras`.
        retyped: Ids of control tokens that the file lists as ordinary.
        special: Special tokens: text → id.
        added: Added tokens that are not special: text → id.
        unused: Tokens that text cannot produce: text → id.
        ordinary: Ordinary tokens: text → id.
        ranks: See `Tokenizer`.
    """

    texts: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    roles: dict[str, int]
    retyped: list[int]
    special: dict[str, int]
    added: dict[str, int]
    unused: dict[str, int]
    ordinary: dict[str, int]
    ranks: dict[bytes, int]

    def name_of(self, role: str) -> str | None:
        """Return the text of the special or added token with a role."""
        named = {**self.special, **self.added}
        return next((text for text, id in named.items() if id == self.roles.get(role)), None)

    def tokenizer(self, pattern: str, bos: str | None = None, *, whole: bool = True) -> Tokenizer:
        """Build the tokenizer.

        Args:
            pattern: The pre-tokenizer's pattern.
            bos: Text of the BOS token, if it is prepended to prompts.
            whole: See `unmergeable`.
        """
        hidden = unmergeable(self.merges, self.ordinary, whole=whole)
        ends = {self.roles.get(role) for role in ("eos", "eot", "eom")}
        named = {**self.special, **self.added}
        return Tokenizer(
            self.ranks,
            self.special,
            pattern,
            added_tokens=self.added,
            unused_tokens=self.unused,
            bos=bos,
            stops={text for text, id in named.items() if text in STOPS or id in ends},
            unknown=self.name_of("unknown"),
            merges=self.merges if hidden else None,
            unmergeable=ranks_of((self.ordinary[text], text) for text in hidden),
            whole_pieces=whole or not hidden,
        )


def _read_vocabulary(metadata: dict[str, Any]) -> _Vocabulary:
    texts = _list(metadata, "tokenizer.ggml.tokens", str)
    types = [_NORMAL] * len(texts)
    if "tokenizer.ggml.token_type" in metadata:
        types = _list(metadata, "tokenizer.ggml.token_type", int)
    if len(texts) != len(types):
        raise CheckpointError(f"it has {len(texts)} tokens but {len(types)} token types. {REDOWNLOAD_HINT}")
    if len(set(texts)) != len(texts) or "" in texts:
        raise CheckpointError(f"a token of the vocabulary is empty or repeated. {REDOWNLOAD_HINT}")
    roles = _roles(metadata, len(texts))
    lines = _list(metadata, _MERGES, str)
    check_counts(texts, lines)
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    merged = {left + right for left, right in merges}
    retyped = _retyped(texts, types, roles, merged)
    controls, kinds = set(retyped), list(map(kind_of, texts, types))
    special = {text: id for id, text in enumerate(texts) if id in controls or kinds[id] == "special"}
    added = {text: id for id, text in enumerate(texts) if kinds[id] == "added"}
    named = {**special, **added}
    ordinary = {
        text: id
        for id, text in enumerate(texts)
        if is_reachable(text, merged) or (kinds[id] == "ordinary" and text not in named)
    }
    unused = {text: id for id, text in enumerate(texts) if text not in named and text not in ordinary}
    ranks = ranks_of((id, text) for text, id in ordinary.items())
    check_merges(merges, ordinary)
    return _Vocabulary(texts, types, merges, roles, retyped, special, added, unused, ordinary, ranks)


def _retyped(texts: list[str], types: list[int], roles: Mapping[str, int], merged: Collection[str]) -> list[int]:
    """Find control tokens listed as ordinary: plain text cannot produce them."""
    role_ids = set(roles.values())
    return [
        id
        for id, (text, type_) in enumerate(zip(texts, types, strict=True))
        if type_ == _NORMAL and (is_hidden_control(text, merged) or (id in role_ids and not is_reachable(text, merged)))
    ]


def _retyped_warning(vocabulary: _Vocabulary) -> str:
    names = ", ".join(f"'{sanitize(vocabulary.texts[id])}'" for id in vocabulary.retyped[:_MAX_NAMED])
    others = len(vocabulary.retyped) - _MAX_NAMED
    more = f" and {others} more" if others > 0 else ""
    return (
        f"The file marks control tokens as ordinary ones, or has no token types ({names}{more}). "
        "They are treated as special tokens."
    )


def kind_of(text: str, type_: int) -> str:
    """Return how a token is matched: "special", "added", "ordinary" or "unused".

    As in llama.cpp, tokens with the name of a control token are special.

    Args:
        text: The token's text.
        type_: GGUF's type of the token.
    """
    if type_ == _USER_DEFINED:
        return "special" if text in CONTROL else "added"
    return {_NORMAL: "ordinary", _UNKNOWN: "special", _CONTROL: "special"}.get(type_, "unused")


def _roles(metadata: Mapping[str, Any], n_tokens: int) -> dict[str, int]:
    """Read the ids of tokens with a role: eos, padding, fim_pre and so on."""
    fields = ((match[1], id) for key, id in metadata.items() if (match := _TOKEN_ID.fullmatch(key)))
    return {role: id for role, id in fields if type(id) is int and 0 <= id < n_tokens}


def _list(metadata: dict[str, Any], key: str, kind: type) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(type(element) is kind for element in value):
        raise CheckpointError(f"the metadata field {key} is missing or of the wrong type. {REDOWNLOAD_HINT}")
    return value


# --- Chat template ----------------------------------------------------------------------------


def read_chat(metadata: dict[str, Any], tokenizer: Tokenizer) -> ChatFormat | None:
    """Read the file's chat template, or return None for a base model.

    Args:
        metadata: The file's metadata.
        tokenizer: The model's tokenizer.

    Raises:
        CheckpointError: If the template is not text.
    """
    template = metadata.get("tokenizer.chat_template")
    if not template:
        return None
    if not isinstance(template, str):
        raise CheckpointError(
            f"the metadata field tokenizer.chat_template is a {type(template).__name__}, expected text. "
            + REDOWNLOAD_HINT
        )
    roles = _roles(metadata, tokenizer.n_vocab)
    names = {id: text for text, id in tokenizer.names.items()}
    bos, eos = (names.get(roles.get(role, -1), "") for role in ("bos", "eos"))
    return TemplateFormat(replace_surrogates(template), bos, eos, tuple(tokenizer.special_tokens))
