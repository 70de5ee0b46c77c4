"""Information in a model's files that only conversion uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Extras:
    """Information in a checkpoint's files that does not affect its output.

    Args:
        roles: GGUF's name of a role → token id: bos, eos, eot, eom, unknown, padding, seperator, mask and so on.
            Whether a prompt starts with bos depends on the tokenizer's `bos_id`.
        flagged: Ids of tokens that the files mark as special, although plain text can produce them.
        token_types: GGUF's type of each token.
        generation: generation_config.json, or a GGUF file's sampling defaults under the same names.
        settings: tokenizer_config.json.
        ids: The fields of config.json that name a token, such as eos_token_id.
        metadata: GGUF metadata about the model and its chat templates.
    """

    roles: Mapping[str, int] = field(default_factory=dict)
    flagged: frozenset[int] = frozenset()
    token_types: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
