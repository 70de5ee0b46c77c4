"""Messages of the library, rewritten for users of the command line."""

from __future__ import annotations

import re

# Name in backticks in a message of the library → option or command.
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
    """Replace the argument names in a message by options and commands.

    >>> user_message("The factor is 0.5 (`rope_factor`).")
    'The factor is 0.5 (--rope-factor).'
    """
    return re.sub(r"`([^`]+)`", lambda match: _NAMES.get(match[1], match[0]), str(message))
