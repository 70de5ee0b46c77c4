"""The steps of a tokenizer.json that change and cut a text → the known pattern that cuts alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_scratch.checkpoint.byte_level_bpe import PATTERNS
from llama_scratch.errors import CheckpointError, sanitize

USE_ANOTHER = "name a tokenizer.model with `tokenizer`, or use another model."
# Other expressions that cut every text as the known ones do: that of cl100k_base, and OpenAI's later ones of GPT-2's.
_SPELLINGS = {pattern: pattern for pattern in PATTERNS.values()} | {
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": PATTERNS["llama-bpe"],
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": PATTERNS["gpt-2"],
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": PATTERNS["gpt-2"],
}
# Steps by their meaning, and the pattern that cuts as they do.
_KNOWN: dict[tuple[str | None, ...], str] = {
    ("GPT-2, bytes",): PATTERNS["gpt-2"],
    ("digits", "GPT-2, bytes"): PATTERNS["smollm"],
    **{(pattern, "bytes"): pattern for pattern in PATTERNS.values()},
}


def check_kind(parts: dict[str, Any], model: dict[str, Any]) -> None:
    """Byte-level BPE writes every byte as a character of its own; what else is called BPE does otherwise."""
    normalizer = parts.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence" and normalizer.get("normalizers") == []:
        normalizer = None
    if model.get("byte_fallback"):
        raise CheckpointError(f"it is of SentencePiece's kind (byte_fallback), expected byte-level BPE; {USE_ANOTHER}")
    if normalizer is not None:
        raise CheckpointError(
            f"it changes text before it cuts it ({_type(normalizer)}), expected no normalizer; {USE_ANOTHER}"
        )
    if _type(model) != "BPE":
        raise CheckpointError(f"the model is of the type {_type(model)}, expected BPE; {USE_ANOTHER}")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise CheckpointError(f"it has a {field} ({sanitize(model[field])}), expected none; {USE_ANOTHER}")


def pattern_of(part: Any) -> str:
    """The expression that cuts text as the steps of a pre-tokenizer do."""
    steps = part.get("pretokenizers") if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    if isinstance(steps, list) and all(isinstance(step, dict) for step in steps):
        if (pattern := _KNOWN.get(tuple(map(_meaning, steps)))) is not None:
            return pattern
        for step in steps:
            if isinstance(step.get("pattern"), dict):
                patterns = ", ".join(map(sanitize, step["pattern"].values()))
                raise CheckpointError(
                    f"it cuts text by the pattern '{sanitize(patterns, 100)}' ({_type(part)}), "
                    f"expected that of Llama 3, SmolLM2 or GPT-2; {USE_ANOTHER}"
                )
    raise CheckpointError(
        f"it cuts text by {_type(part)}, expected the steps of Llama 3, SmolLM2 or GPT-2 as they are; {USE_ANOTHER}"
    )


def _meaning(step: Mapping[str, Any]) -> str | None:
    """A step by what it does to a text: "bytes", "GPT-2, bytes", "digits", or the pattern that it cuts by."""
    kind = step.get("type")
    if kind == "ByteLevel" and step.get("add_prefix_space") is False:
        return "GPT-2, bytes" if step.get("use_regex", True) is True else "bytes"  # older files do not write it
    if kind == "Digits" and step.get("individual_digits") is True:
        return "digits"
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) and len(pattern) == 1 else None
    if kind != "Split" or not isinstance(regex, str):
        return None
    behavior, invert = step.get("behavior"), step.get("invert", False)
    # The known expressions leave nothing of a text between their matches, so these keep the same pieces.
    if behavior in ("Isolated", "MergedWithPrevious", "MergedWithNext") or (behavior, invert) == ("Removed", True):
        return _SPELLINGS.get(regex)
    return None


def _type(part: Any) -> str:
    """What a part of the chain is called: a sequence by what is in it."""
    if not isinstance(part, dict):
        return sanitize(part)
    inner = next((part[key] for key in ("normalizers", "pretokenizers") if isinstance(part.get(key), list)), None)
    if inner is None:
        return sanitize(part.get("type"))
    return sanitize(" + ".join(sanitize(step.get("type")) if isinstance(step, dict) else "?" for step in inner[:8]))
