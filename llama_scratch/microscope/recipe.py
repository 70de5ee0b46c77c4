"""The arguments of an intervention as plain values, for session files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """The arguments of a function in `interventions`.

    Fields that `kind` does not use keep their defaults.

    Attributes:
        kind: The name of the function.
        part: The name of the component that is ablated or patched.
        layer: The layer of a steering vector.
        scale: The factor of a steering vector.
        ids: The token ids of the text whose activations are used. A steering vector leads toward this text.
        away: The token ids of the text that a steering vector leads away from.
        positions: For a patch, pairs of a position in the prompt and a position in the other text.
    """

    kind: Literal["ablate", "mean_ablate", "patch", "steer"]
    part: str = ""
    layer: int = 0
    scale: float = 0.0
    ids: tuple[int, ...] = ()
    away: tuple[int, ...] = ()
    positions: tuple[tuple[int, int], ...] = ()
