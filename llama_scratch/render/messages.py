"""The library's messages for a user of the program, who knows options and commands instead of arguments."""

from __future__ import annotations

import re

# What the library's messages have in backticks, and the name that the user knows.
_NAMES = {
    "activations": "--activations",
    "calibration": "--calibration",
    "context": "--context",
    "max_new_tokens": "--generate",
    "precision": "--precision",
    "pull_meta": "--from-url",
    "rope_factor": "--rope-factor",
    "source": "--model-dir",
    "source=smollm2": "--model smollm2",
    "threads": "--threads",
    "to": "--to",
    "to=gguf": "--to gguf",
    "to=hf": "--to hf",
    "to=meta": "--to meta",
    "tokenizer": "--tokenizer",
    "tokens": "/tokens",
    "top": "--top",
}


def user_message(message: object) -> str:
    """Name options and commands in the message of an error. "… (`rope_factor`)." → "… (--rope-factor)." """
    return re.sub(r"`([^`]+)`", lambda match: _NAMES.get(match[1], match[0]), str(message))
