"""Facts in a model's files that no answer depends on. Converting keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Extras:
    """What a checkpoint's files say beyond shape, tokenizer and weights.

    Args:
        roles: Ids of the tokens that the files name, by GGUF's word for the role: bos, eos, eot, eom, unknown,
            padding, seperator, mask and so on. Whether a prompt begins with bos is the tokenizer's `bos_id`.
        flagged: Ids that the files call special although plain text makes them.
        token_types: GGUF's type of each token.
        generation: generation_config.json, or a GGUF file's sampling defaults under its names.
        settings: tokenizer_config.json.
        ids: The fields of config.json that name a token, such as eos_token_id.
        metadata: GGUF's metadata about the model and its chat templates.
    """

    roles: Mapping[str, int] = field(default_factory=dict)
    flagged: frozenset[int] = frozenset()
    token_types: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
