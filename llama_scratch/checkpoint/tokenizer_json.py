"""Hugging Face's tokenizer.json → `Tokenizer`, where the two cut every text alike.

That file describes a chain: a normaliser, a pre-tokenizer that cuts text into pieces, a model that merges within
them, and a post-processor that puts special tokens around. Byte-level BPE behind one of the known patterns is what
tiktoken does; anything else is refused in a sentence that says what it is.

What `ignore_merges` says needs no rule here. Where it is true, a piece that is a token becomes that token at once,
as in tiktoken, which Llama 3's vocabulary needs for 588 of its tokens; where it is false the merges of a
vocabulary that was trained make each of its tokens anyway.
Source: the `tokenizers` package, whose JSON it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llama_scratch.checkpoint.json_file import read_object
from llama_scratch.checkpoint.vocabulary import PATTERNS, STOPS, check_merges, ranks_of
from llama_scratch.errors import FETCH_AGAIN, CheckpointError, printable
from llama_scratch.tokenizer import Tokenizer

# Llama 3's has 9 to 17 MB, depending on how it writes its merges.
_MAX_BYTES = 1 << 25
_MAX_ID = 1 << 24
# Embeddings are made longer than the vocabulary to have a size that suits a GPU, or for tokens to come.
_MAX_UNUSED = 1 << 12

_ELSEWHERE = "name a tokenizer.model with --tokenizer, or use another model."
_TO_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
# Pre-tokenizers, step by step, and the pattern that cuts as they do.
_KNOWN: list[tuple[list[dict[str, Any]], str]] = [
    ([_TO_BYTES | {"use_regex": True}], PATTERNS["gpt-2"]),
    ([{"type": "Digits", "individual_digits": True}, _TO_BYTES | {"use_regex": True}], PATTERNS["smollm"]),
    *(
        (
            [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                _TO_BYTES | {"use_regex": False},
            ],
            pattern,
        )
        for pattern in PATTERNS.values()
    ),
]


def read_tokenizer(path: Path, config: Mapping[str, Any], stop_ids: Collection[int], vocab_size: int) -> Tokenizer:
    """Read tokenizer.json.

    config: what tokenizer_config.json says. stop_ids: ids of tokens that end a text, as other files say.
    vocab_size: rows of the embedding; ids that no token has get names of their own, `[PAD128300]`, as llama.cpp's
    converter gives them. Raises `CheckpointError`.
    """
    parts = read_object(path, _MAX_BYTES, required=True)
    try:
        return _tokenizer(parts, config, stop_ids, vocab_size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def named_token(config: Mapping[str, Any], field: str) -> str | None:
    """The text of a special token that tokenizer_config.json names in a field, such as "bos_token"."""
    token = config.get(field)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _tokenizer(
    parts: dict[str, Any], config: Mapping[str, Any], stop_ids: Collection[int], vocab_size: int
) -> Tokenizer:
    model = _field(parts, "model", dict)
    _check_kind(parts, model)
    pattern = _pattern(parts.get("pre_tokenizer"))
    vocab = _field(model, "vocab", dict)
    special = _added_tokens(parts, vocab)
    ids = [*(id for text, id in vocab.items() if text not in special), *special.values()]
    if not all(type(id) is int and 0 <= id < _MAX_ID for id in ids) or len(set(ids)) != len(ids):
        raise CheckpointError(f"the ids of the tokens are no numbers, or one stands there twice; {FETCH_AGAIN}")
    ranks = ranks_of((id, text) for text, id in vocab.items() if text not in special)
    check_merges(map(_merge, _field(model, "merges", list)), ranks)
    special |= _unused(set(ids), set(special), vocab_size)

    unknown = model.get("unk_token") or named_token(config, "unk_token")
    if model.get("fuse_unk") and any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(f"it joins unknown bytes (fuse_unk), expected one token for each byte; {_ELSEWHERE}")
    eos = named_token(config, "eos_token")
    return Tokenizer(
        ranks,
        special,
        pattern,
        bos=_bos(parts.get("post_processor"), config, special),
        stops={text for text, id in special.items() if text in STOPS or text == eos or id in stop_ids},
        unknown=unknown if isinstance(unknown, str) and unknown in special else None,
    )


def _field(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    if not isinstance(value, kind):
        raise CheckpointError(f"the field {name} is {printable(value)}, expected a JSON {kind.__name__}; {FETCH_AGAIN}")
    return value


def _check_kind(parts: dict[str, Any], model: dict[str, Any]) -> None:
    """Byte-level BPE writes every byte as a character of its own; what else is called BPE does otherwise."""
    normalizer = parts.get("normalizer")
    if model.get("byte_fallback"):
        raise CheckpointError(f"it is of SentencePiece's kind (byte_fallback), expected byte-level BPE; {_ELSEWHERE}")
    if normalizer is not None:
        raise CheckpointError(
            f"it changes text before it cuts it ({_type(normalizer)}), expected no normalizer; {_ELSEWHERE}"
        )
    if _type(model) != "BPE":
        raise CheckpointError(f"the model is of the type {_type(model)}, expected BPE; {_ELSEWHERE}")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise CheckpointError(f"it has a {field} ({printable(model[field])}), expected none; {_ELSEWHERE}")


def _type(part: Any) -> str:
    """What a part of the chain is called: a sequence by what is in it."""
    if not isinstance(part, dict):
        return printable(part)
    inner = next((part[key] for key in ("normalizers", "pretokenizers") if isinstance(part.get(key), list)), None)
    if inner is None:
        return printable(part.get("type"))
    return printable(" + ".join(str(step.get("type")) if isinstance(step, dict) else "?" for step in inner))


def _pattern(part: Any) -> str:
    steps = part.get("pretokenizers") if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    if isinstance(steps, list) and all(isinstance(step, dict) for step in steps):
        # Trimming concerns offsets, which nothing here has; older files do not write use_regex.
        plain = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
        plain = [{"use_regex": True} | step if step.get("type") == "ByteLevel" else step for step in plain]
        for known, pattern in _KNOWN:
            if plain == known:
                return pattern
        for step in steps:
            if isinstance(step.get("pattern"), dict):
                said = ", ".join(map(str, step["pattern"].values()))
                raise CheckpointError(
                    f"it cuts text by the pattern '{printable(said, 100)}' ({_type(part)}), "
                    f"expected that of Llama 3, SmolLM2 or GPT-2; {_ELSEWHERE}"
                )
    raise CheckpointError(
        f"it cuts text by {_type(part)}, expected the steps of Llama 3, SmolLM2 or GPT-2 as they are; {_ELSEWHERE}"
    )


def _added_tokens(parts: dict[str, Any], vocab: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that stand beside the merges: text → id."""
    found: dict[str, int] = {}
    for token in _field(parts, "added_tokens", list) if parts.get("added_tokens") is not None else []:
        text, id = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(text, str) or type(id) is not int or text in found or vocab.get(text, id) != id:
            raise CheckpointError(
                f"the added token {printable(text)} has the id {printable(id)}, expected a text with an id of its own "
                f"that is the same in the vocabulary; {FETCH_AGAIN}"
            )
        # Those would change how text around them is read, or what no special token is in.
        if not text.strip() or token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise CheckpointError(
                f"the added token '{printable(text)}' takes white space or whole words alone, "
                f"expected one that is found by its text; {_ELSEWHERE}"
            )
        found[text] = id
    return found


def _merge(merge: Any) -> tuple[str, str]:
    """Two tokens, written "a b" or, since merges may hold spaces, ["a", "b"]."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise CheckpointError(f"the merge '{printable(merge)}' is not of two tokens; {FETCH_AGAIN}")
    return pair[0], pair[1]


def _unused(ids: set[int], names: set[str], vocab_size: int) -> dict[str, int]:
    """Names for the rows of the embedding that no token has: none is ever in a text, but a model can give one."""
    if vocab_size - len(ids) > _MAX_UNUSED:
        raise CheckpointError(
            f"it has {len(ids):,} tokens and the model's embedding {vocab_size:,}, expected about as many; "
            "use the tokenizer that came with the model."
        )
    unused = {f"[PAD{id}]": id for id in range(vocab_size) if id not in ids}
    if twice := names & unused.keys():
        raise CheckpointError(f"the added token '{printable(min(twice))}' has an id that is not its own; {FETCH_AGAIN}")
    return unused


def _bos(processor: Any, config: Mapping[str, Any], special: Mapping[str, int]) -> str | None:
    """The special token that the post-processor puts in front of a text; what it puts behind ends one.

    Without a template in it, tokenizer_config.json says whether its bos_token comes first.
    """
    try:
        parts = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
        templates = []
        for part in filter(None, parts):
            if part["type"] not in ("ByteLevel", "TemplateProcessing"):
                raise CheckpointError(
                    f"it puts special tokens around a text by {printable(part['type'])}, "
                    f"expected TemplateProcessing; {_ELSEWHERE}"
                )
            templates += [part] if part["type"] == "TemplateProcessing" else []
        if not templates:
            bos = named_token(config, "bos_token")
            return bos if config.get("add_bos_token") is True and bos in special else None
        front: list[int] = []
        for template in templates:
            names = [piece.get("SpecialToken", {}).get("id") for piece in template["single"]]
            for name in names[: names.index(None)]:
                front += template["special_tokens"][name]["ids"]
        found = [text for text, id in special.items() if id in front]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the post_processor cannot be read ({printable(repr(error))}); {FETCH_AGAIN}") from error
    if len(front) > 1 or len(found) != len(front):
        raise CheckpointError(
            f"the tokens {printable(front)} come in front of a text, expected one special token or none; {_ELSEWHERE}"
        )
    return found[0] if found else None
