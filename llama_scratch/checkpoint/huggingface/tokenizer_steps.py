"""Find the pattern that is equivalent to a tokenizer.json's steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_scratch.checkpoint.byte_level_bpe import PATTERNS
from llama_scratch.errors import CheckpointError, sanitize

USE_ANOTHER = "Pass a tokenizer.model as `tokenizer`, or use another model."
# Expressions that are equivalent to a known pattern: cl100k_base's, and OpenAI's later versions of GPT-2's.
_SPELLINGS = {pattern: pattern for pattern in PATTERNS.values()} | {
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": PATTERNS["llama-bpe"],
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": PATTERNS["gpt-2"],
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": PATTERNS["gpt-2"],
}
# Steps, as named by `_meaning` → the equivalent pattern.
_KNOWN: dict[tuple[str | None, ...], str] = {
    ("GPT-2, bytes",): PATTERNS["gpt-2"],
    ("digits", "GPT-2, bytes"): PATTERNS["smollm"],
    **{(pattern, "bytes"): pattern for pattern in PATTERNS.values()},
}


def check_kind(parts: dict[str, Any], model: dict[str, Any]) -> None:
    """Check that a tokenizer is byte-level BPE without a normalizer.

    Args:
        parts: Content of tokenizer.json.
        model: The field `model` in it.

    Raises:
        CheckpointError: If the tokenizer is of another kind.
    """
    normalizer = parts.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence" and normalizer.get("normalizers") == []:
        normalizer = None
    if model.get("byte_fallback"):
        raise CheckpointError(f"it is SentencePiece BPE (byte_fallback), expected byte-level BPE. {USE_ANOTHER}")
    if normalizer is not None:
        raise CheckpointError(f"it normalizes text ({_type(normalizer)}), expected no normalizer. {USE_ANOTHER}")
    if _type(model) != "BPE":
        raise CheckpointError(f"the model is of the type {_type(model)}, expected BPE. {USE_ANOTHER}")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise CheckpointError(f"it has a {field} ({sanitize(model[field])}), which is not supported. {USE_ANOTHER}")


def pattern_of(part: Any) -> str:
    """Return the pattern that is equivalent to the steps of a pre-tokenizer.

    Raises:
        CheckpointError: If the steps are not equivalent to a known pattern.
    """
    steps = part.get("pretokenizers") if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    if isinstance(steps, list) and all(isinstance(step, dict) for step in steps):
        if (pattern := _KNOWN.get(tuple(map(_meaning, steps)))) is not None:
            return pattern
        for step in steps:
            if isinstance(step.get("pattern"), dict):
                patterns = ", ".join(map(sanitize, step["pattern"].values()))
                raise CheckpointError(
                    f"it splits text by the pattern '{sanitize(patterns, 100)}' ({_type(part)}), "
                    f"expected that of Llama 3, SmolLM2 or GPT-2. {USE_ANOTHER}"
                )
    raise CheckpointError(
        f"it splits text by {_type(part)}, expected exactly the steps of Llama 3, SmolLM2 or GPT-2. {USE_ANOTHER}"
    )


def _meaning(step: Mapping[str, Any]) -> str | None:
    """Name a step: "bytes", "GPT-2, bytes", "digits", or its pattern."""
    kind = step.get("type")
    if kind == "ByteLevel" and step.get("add_prefix_space") is False:
        return "GPT-2, bytes" if step.get("use_regex", True) is True else "bytes"  # missing in older files
    if kind == "Digits" and step.get("individual_digits") is True:
        return "digits"
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) and len(pattern) == 1 else None
    if kind != "Split" or not isinstance(regex, str):
        return None
    behavior, invert = step.get("behavior"), step.get("invert", False)
    # The matches of the known expressions cover the whole text, so these behaviors are equivalent.
    if behavior in ("Isolated", "MergedWithPrevious", "MergedWithNext") or (behavior, invert) == ("Removed", True):
        return _SPELLINGS.get(regex)
    return None


def _type(part: Any) -> str:
    """Return the type of a step. For a sequence, return the types of its steps."""
    if not isinstance(part, dict):
        return sanitize(part)
    inner = next((part[key] for key in ("normalizers", "pretokenizers") if isinstance(part.get(key), list)), None)
    if inner is None:
        return sanitize(part.get("type"))
    return sanitize(" + ".join(sanitize(step.get("type")) if isinstance(step, dict) else "?" for step in inner[:8]))
