"""How an intervention is made, as plain values without tensors: what a session file keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """The arguments of one of the functions in `interventions`. Fields that `kind` does not use keep their defaults.

    kind: The function's name.
    part: The name of the part that is ablated or patched.
    layer, scale: Of a steering vector.
    ids: The text whose activations are used; of a steering vector the text that it leads to.
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
