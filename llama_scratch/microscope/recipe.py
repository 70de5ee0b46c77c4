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
        ids: The text whose activations are used; for a steering vector, the text that it leads toward.
        away: The text that a steering vector leads away from.
        positions: Pairs of a position in the prompt and one in the other text, for a patch.
    """

    kind: Literal["ablate", "mean_ablate", "patch", "steer"]
    part: str = ""
    layer: int = 0
    scale: float = 0.0
    ids: tuple[int, ...] = ()
    away: tuple[int, ...] = ()
    positions: tuple[tuple[int, int], ...] = ()
