"""Convert Hugging Face's tokenizer.json to an equivalent `Tokenizer`.

The file describes a pipeline: a normalizer, a pre-tokenizer that splits text into pieces, a model that merges within
pieces, and a post-processor that adds special tokens. tiktoken splits text with a regular expression and applies
byte-level BPE to each piece. Both are equivalent if the pipeline's steps match one of the known patterns. For any other
pipeline, the error names the unsupported step.

With `ignore_merges`, a piece that equals a token is encoded as that token without merging, as in tiktoken. Llama 3
needs this for 588 tokens. Without `ignore_merges`, the merges must produce every token. They do if the vocabulary was
trained in one run. For other vocabularies, `unmergeable` finds the tokens that the merges cannot produce.
Source: the `tokenizers` package.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_scratch.checkpoint.byte_level_bpe import (
    STOPS,
    check_counts,
    check_merges,
    is_hidden_control,
    is_reachable,
    ranks_of,
    unmergeable,
)
from llama_scratch.checkpoint.fields import read_object
from llama_scratch.checkpoint.huggingface.tokenizer_steps import USE_ANOTHER, check_kind, pattern_of
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, sanitize
from llama_scratch.tokenizer import Tokenizer

# Llama 3's file is 9 to 17 MB, depending on how merges are written.
_MAX_BYTES = 1 << 25
_MAX_ID = 1 << 24
# An embedding may have more rows than there are tokens, as padding for GPUs or for future tokens.
_MAX_UNUSED = 1 << 12

# Field of tokenizer_config.json with a token → GGUF's name of the token's role.
ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",
    "mask_token": "mask",
    "cls_token": "cls",
}
# Maximum number of tokens named in a warning.
_MAX_NAMED = 3


@dataclass(frozen=True)
class ReadTokenizer:
    """The content of a tokenizer.json.

    Args:
        tokenizer: The tokenizer.
        roles: See `Extras`.
        flagged: See `Extras`.
        warnings: See `Checkpoint`.
    """

    tokenizer: Tokenizer
    roles: Mapping[str, int]
    flagged: frozenset[int]
    warnings: tuple[str, ...]


def read_tokenizer(path: Path, config: Mapping[str, Any], stop_ids: Collection[int], vocab_size: int) -> Tokenizer:
    """Read tokenizer.json and return only the tokenizer.

    For arguments and errors see `read_tokenizer_json`.
    """
    return read_tokenizer_json(path, config, stop_ids, vocab_size).tokenizer


def read_tokenizer_json(
    path: Path, config: Mapping[str, Any], stop_ids: Collection[int], vocab_size: int
) -> ReadTokenizer:
    """Read tokenizer.json.

    Args:
        path: The file.
        config: tokenizer_config.json, with missing fields from special_tokens_map.json.
        stop_ids: Stop token ids from other files.
        vocab_size: Number of rows of the embedding. Ids without a token get names such as `[PAD128300]`, as in
            llama.cpp's converter. Added tokens beyond the last row are dropped with a warning.

    Raises:
        CheckpointError: If the file is damaged, or the tokenizer is not supported.
    """
    parts = read_object(path, _MAX_BYTES, required=True)
    try:
        return _tokenizer(parts, config, stop_ids, vocab_size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def named_token(config: Mapping[str, Any], field: str) -> str | None:
    """Return the text of a special token.

    Args:
        config: Content of tokenizer_config.json.
        field: A field such as "bos_token". Its value is text, or an object with `content`.
    """
    token = config.get(field)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _tokenizer(
    parts: dict[str, Any], config: Mapping[str, Any], stop_ids: Collection[int], vocab_size: int
) -> ReadTokenizer:
    model = _field(parts, "model", dict)
    check_kind(parts, model)
    pattern = pattern_of(parts.get("pre_tokenizer"))
    vocab, merges = _vocabulary(parts, model, vocab_size)
    merged = {left + right for left, right in merges}
    added = _added_tokens(parts, vocab)
    special_elsewhere = _named_elsewhere(config, added, vocab)
    flags = {text: flag or text in special_elsewhere for text, (_, flag) in added.items()}
    names = {text: id for text, (id, _) in added.items()}
    # Text never produces these tokens: no merge produces them, and every pattern splits their text.
    unused = {text: id for text, id in vocab.items() if text not in names and is_hidden_control(text, merged)}
    ordinary = {text: id for text, id in vocab.items() if text not in unused}
    ordinary = {text: id for text, id in ordinary.items() if text not in names or is_reachable(text, merged)}
    both = names.keys() & ordinary.keys()
    ids = [*ordinary.values(), *unused.values(), *(id for text, id in names.items() if text not in both)]
    _check_ids(ids)
    ranks = ranks_of((id, text) for text, id in ordinary.items())
    check_merges(merges, ordinary)
    whole = model.get("ignore_merges") is True
    hidden = unmergeable(merges, ordinary, whole=whole)

    beyond = {text: id for text, id in names.items() if id >= vocab_size and text not in both}
    names = {text: id for text, id in names.items() if text not in beyond}
    unused |= _unused(set(ids), names.keys() | unused.keys(), vocab_size)
    unknown = _unknown(model, config, ranks)
    bos = _bos(parts.get("post_processor"), config, added)
    if bos in beyond:
        raise CheckpointError(
            f"the BOS token '{sanitize(bos)}' has the id {beyond[bos]}, beyond the model's embedding of "
            f"{vocab_size:,} rows. Use the tokenizer that came with the model."
        )
    eos = named_token(config, "eos_token")
    special = {text: id for text, id in names.items() if flags[text] and text not in both}
    roles = {role: named_token(config, field) for field, role in ROLES.items()}
    return ReadTokenizer(
        Tokenizer(
            ranks,
            special,
            pattern,
            added_tokens={text: id for text, id in names.items() if text not in special},
            unused_tokens=unused,
            bos=bos,
            stops={text for text, id in names.items() if text in STOPS or text == eos or id in stop_ids},
            unknown=unknown if isinstance(unknown, str) and unknown in names else None,
            merges=merges if hidden else None,
            unmergeable=ranks_of((ordinary[text], text) for text in hidden),
            whole_pieces=whole or not hidden,
        ),
        {
            role: id
            for role, text in roles.items()
            if (id := names.get(text or "", ordinary.get(text or ""))) is not None
        },
        frozenset(id for text, id in names.items() if flags[text] and text in both),
        tuple(_beyond(beyond, vocab_size)),
    )


def _vocabulary(
    parts: dict[str, Any], model: dict[str, Any], vocab_size: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary (text → id) and the merges, after checking counts and ids."""
    vocab = _field(model, "vocab", dict)
    listed = _field(model, "merges", list)
    check_counts(vocab, listed)
    for tokens in (vocab, parts.get("added_tokens")):
        if isinstance(tokens, Sized) and len(tokens) > vocab_size + _MAX_UNUSED:
            raise CheckpointError(
                f"it has {len(tokens):,} tokens, but the model's embedding has {vocab_size:,} rows. "
                "Use the tokenizer that came with the model."
            )
    _check_ids(list(vocab.values()))
    return vocab, list(map(_merge, listed))


def _unknown(model: Mapping[str, Any], config: Mapping[str, Any], ranks: Mapping[bytes, int]) -> Any:
    """Return the token for bytes that are not in the vocabulary."""
    if model.get("fuse_unk") and any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(f"it fuses unknown bytes (fuse_unk), expected one token per byte. {USE_ANOTHER}")
    return model.get("unk_token") or named_token(config, "unk_token")


def _named_elsewhere(
    config: Mapping[str, Any], added: dict[str, tuple[int, bool]], vocab: Mapping[str, int]
) -> set[str]:
    """Read added tokens and roles from tokenizer_config.json, as transformers does.

    Args:
        config: Content of the file.
        added: Added tokens of tokenizer.json. Missing tokens are inserted into it.
        vocab: Vocabulary of tokenizer.json.

    Returns:
        The texts that the file marks as special.
    """
    listed = config.get("added_tokens_decoder")
    special = set()
    taken = {id for id, _ in added.values()} | set(vocab.values())
    for key, token in listed.items() if isinstance(listed, dict) else []:
        text = named_token({"": token}, "") if isinstance(token, dict) else None
        if text is None or not key.isdecimal() or len(key) > 8:
            continue
        id = vocab.get(text, int(key))
        if text not in added and (text in vocab or id not in taken):
            _check_found_by_its_text(text, token)
            added[text] = (id, False)
            taken.add(id)
        if token.get("special") is True:
            special.add(text)
    named = [config.get(field) for field in ROLES]
    for field in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(field)
        named += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    for text in [named_token({"": token}, "") for token in named]:
        if text:
            special.add(text)
            if text in vocab:
                added.setdefault(text, (vocab[text], True))
    return special


def _beyond(tokens: Mapping[str, int], vocab_size: int) -> Iterator[str]:
    """Warn about tokens without a row in the embedding."""
    if tokens:
        names = ", ".join(f"'{sanitize(text)}'" for text in list(tokens)[:_MAX_NAMED])
        more = f" and {len(tokens) - _MAX_NAMED} more" if len(tokens) > _MAX_NAMED else ""
        yield (
            f"The tokenizer has tokens beyond the {vocab_size:,} rows of the model's embedding ({names}{more}). "
            "The model cannot use them, so their names in a text are tokenized as plain text."
        )


def _check_ids(ids: list[Any]) -> None:
    if not all(type(id) is int and 0 <= id < _MAX_ID for id in ids) or len(set(ids)) != len(ids):
        raise CheckpointError(f"a token id is not an integer, or is repeated. {REDOWNLOAD_HINT}")


def _field(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    if not isinstance(value, kind):
        raise CheckpointError(
            f"the field {name} is {sanitize(value)}, expected a JSON {kind.__name__}. {REDOWNLOAD_HINT}"
        )
    return value


def _added_tokens(parts: dict[str, Any], vocab: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """Return added tokens: text → (id, special). They are matched before all steps."""
    added: dict[str, tuple[int, bool]] = {}
    for token in _field(parts, "added_tokens", list) if parts.get("added_tokens") is not None else []:
        text, id = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(text, str) or type(id) is not int or text in added or vocab.get(text, id) != id:
            raise CheckpointError(
                f"the added token {sanitize(text)} has the id {sanitize(id)}. Its text must be unique, and its id must "
                f"be the same as in the vocabulary. {REDOWNLOAD_HINT}"
            )
        _check_found_by_its_text(text, token)
        added[text] = (id, token.get("special") is True)
    return added


def _check_found_by_its_text(text: str, token: Mapping[str, Any]) -> None:
    """Reject a token that strips whitespace, or is matched only as a whole word."""
    if not text or token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
        raise CheckpointError(
            f"the added token '{sanitize(text)}' strips whitespace or matches only whole words, "
            f"which is not supported. {USE_ANOTHER}"
        )


def _merge(merge: Any) -> tuple[str, str]:
    """Parse a merge: "a b" or, because tokens may have spaces, ["a", "b"]."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise CheckpointError(f"the merge '{sanitize(merge)}' does not have two tokens. {REDOWNLOAD_HINT}")
    return pair[0], pair[1]


def _unused(ids: set[int], names: Set[str], vocab_size: int) -> dict[str, int]:
    """Create placeholder names for rows of the embedding without a token.

    Text is never encoded as one of these ids, but a model can generate them.
    """
    if vocab_size - len(ids) > _MAX_UNUSED:
        raise CheckpointError(
            f"it has {len(ids):,} tokens, but the model's embedding has {vocab_size:,} rows. "
            "Use the tokenizer that came with the model."
        )
    unused = {f"[PAD{id}]": id for id in range(vocab_size) if id not in ids}
    if twice := names & unused.keys():
        raise CheckpointError(
            f"the added token '{sanitize(min(twice))}' has the placeholder name of another id. {REDOWNLOAD_HINT}"
        )
    return unused


def _bos(processor: Any, config: Mapping[str, Any], added: Mapping[str, Any]) -> str | None:
    """Return the BOS token that the post-processor prepends, if any.

    Without a template, `add_bos_token` in tokenizer_config.json decides. Tokens after the text are ignored.
    """
    try:
        parts = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
        templates = []
        for part in filter(None, parts):
            if part["type"] not in ("ByteLevel", "TemplateProcessing"):
                raise CheckpointError(
                    f"it adds special tokens by {sanitize(part['type'])}, expected TemplateProcessing. {USE_ANOTHER}"
                )
            templates += [part] if part["type"] == "TemplateProcessing" else []
        if not templates:
            bos = named_token(config, "bos_token")
            return bos if config.get("add_bos_token") is True and bos in added else None
        front: list[int] = []
        for template in templates:
            names = [piece.get("SpecialToken", {}).get("id") for piece in template["single"]]
            for name in names[: names.index(None)]:
                front += template["special_tokens"][name]["ids"]
        tokens = [text for text, (id, _) in added.items() if id in front[:2]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the post_processor cannot be read ({sanitize(repr(error))}). {REDOWNLOAD_HINT}"
        ) from error
    if len(front) > 1 or len(tokens) != len(front):
        raise CheckpointError(
            f"it puts the tokens {sanitize(front)} before a text, expected at most one special token. {USE_ANOTHER}"
        )
    return tokens[0] if tokens else None
