"""The rotary embedding: how far each pair is turned at a position, and what that does to a real query and its keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_scratch.config import SCALED_CONTEXT, ModelArgs
from llama_scratch.hooks import Hook
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.display import Displayable
from llama_scratch.microscope.parts import numbered
from llama_scratch.model import apply_rotary_emb, rope_frequencies, rotations
from llama_scratch.results import JsonResult, Token
from llama_scratch.system.progress import Progress, silent

# The factor that is shown where the model has none: that of Llama 3.2's 1B and 3B.
_FACTOR = 32.0
# Keys that are shown.
_NEAREST = 24


@dataclass(frozen=True)
class RotaryPair(JsonResult):
    """One complex pair of a head's vector, unscaled and scaled: radians that it turns by for each token.

    kind: what the scaling does with it, "kept", "smoothed" or "divided". unscaled_angle, scaled_angle: where it stands
    at the position, 0 to 2π, in the float32 of the network.
    """

    pair: int
    unscaled: float
    scaled: float
    kind: str
    unscaled_angle: float
    scaled_angle: float

    @property
    def unscaled_wavelength(self) -> float:
        """Tokens for a full turn."""
        return math.tau / self.unscaled

    @property
    def scaled_wavelength(self) -> float:
        """Tokens for a full turn."""
        return math.tau / self.scaled

    def as_json(self) -> dict[str, Any]:
        """As it stands in `Rope.as_json`."""
        return {
            "pair": self.pair,
            "kind": self.kind,
            "unscaled": {
                "radians_per_token": self.unscaled,
                "wavelength_tokens": self.unscaled_wavelength,
                "angle": self.unscaled_angle,
            },
            "scaled": {
                "radians_per_token": self.scaled,
                "wavelength_tokens": self.scaled_wavelength,
                "angle": self.scaled_angle,
            },
        }


@dataclass(frozen=True)
class RotatedPair:
    """One pair of the query: its length, which stays, and its angle before and after the turn, 0 to 2π."""

    pair: int
    length: float
    before: float
    after: float


@dataclass(frozen=True)
class KeyScore:
    """A key of the text and its product with the query, q·k/√head_dim: the score that the softmax gets.

    distance: tokens back. unturned: the product of the two without their turns, which knows no distance.
    """

    token: Token
    distance: int
    product: float
    unturned: float


@dataclass(frozen=True)
class Rope(Displayable, JsonResult):
    """The dials at a position, and the last token's query of one head.

    scales: whether the network scales its frequencies; where it does not, `factor` is one that others use, and the
    unscaled ones are the network's own. position: where the dials stand, and to where `query` is turned, pair by pair.
    length: ‖q‖, the same before and after. matches: the nearest keys with the query at its own position, nearest first,
    of `n_keys` in all.
    """

    json_fields = (
        "theta as rope_theta",
        "scales",
        "factor",
        "position",
        "dials",
        "layer",
        "head",
        "token",
        "length as query_length",
        "query",
        "matches",
        "n_keys as keys",
    )

    theta: float
    scales: bool
    factor: float
    position: int
    dials: tuple[RotaryPair, ...]
    layer: int
    head: int
    token: Token
    length: float
    query: tuple[RotatedPair, ...]
    matches: tuple[KeyScore, ...]
    n_keys: int


def rope(
    llama: LoadedModel,
    ids: Sequence[int],
    position: int | None = None,
    layer: int = 0,
    head: int = 0,
    progress: Progress = silent,
) -> Rope:
    """The dials at a position, by default that of the last token, and the last token's query turned to there.

    Raises `UsageError` for a layer, head or position that there is not, and as `Llama.predict` does.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    llama.engine.check(ids)
    args, last = llama.args, len(ids) - 1
    position = numbered("position", last if position is None else position, max(llama.context, SCALED_CONTEXT))
    layer, head = numbered("layer", layer, args.n_layers), numbered("head", head, args.n_heads, " in a layer")
    q, keys = _query_and_keys(llama, ids, layer, head, progress)  # (1, head_dim), (T, head_dim)
    freqs = rope_frequencies(args)  # (head_dim/2,)
    unturned = _turn(q, freqs, torch.tensor([-last]))  # a turn back is a turn by the negative angle
    turned = _turn(unturned, freqs, torch.tensor([position]))
    products = (keys @ q[0] / math.sqrt(args.head_dim)).tolist()
    plain = (_turn(keys, freqs, -torch.arange(len(ids))) @ unturned[0] / math.sqrt(args.head_dim)).tolist()
    nearest = range(last, max(-1, last - _NEAREST), -1)
    return Rope(
        theta=args.rope_theta,
        scales=args.rope_scaling is not None,
        factor=args.rope_scaling.factor if args.rope_scaling else _FACTOR,
        position=position,
        dials=dials(args, position),
        layer=layer,
        head=head,
        token=llama.token(ids[-1]),
        length=float(q.norm()),
        query=tuple(
            RotatedPair(pair, abs(before), _angle(before), _angle(after))
            for pair, (before, after) in enumerate(zip(_pairs(unturned), _pairs(turned), strict=True))
        ),
        matches=tuple(KeyScore(llama.token(ids[n]), last - n, products[n], plain[n]) for n in nearest),
        n_keys=len(ids),
    )


def dials(args: ModelArgs, position: int) -> tuple[RotaryPair, ...]:
    """Each pair's angle at a position, unscaled and scaled; with a factor of 32 where the model does not scale."""
    factor = args.rope_scaling.factor if args.rope_scaling else _FACTOR
    columns = []
    for freqs in (rope_frequencies(args.with_rope_factor(factor)) for factor in (1.0, factor)):
        angles = [_angle(turn) for turn in rotations(freqs, torch.tensor([position]))[0].tolist()]
        columns.append(zip(freqs.tolist(), angles, strict=True))
    return tuple(
        RotaryPair(pair, unscaled, scaled, _kind(scaled / unscaled, factor), angle, scaled_angle)
        for pair, ((unscaled, angle), (scaled, scaled_angle)) in enumerate(zip(*columns, strict=True))
    )


def _kind(ratio: float, factor: float) -> str:
    # Rounding apart: both ends of the blend are exact in float32, or off by its last digit.
    if math.isclose(ratio, 1, rel_tol=1e-6):
        return "kept"
    return "divided" if math.isclose(ratio, 1 / factor, rel_tol=1e-6) else "smoothed"


def _query_and_keys(
    llama: LoadedModel, ids: Sequence[int], layer: int, head: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """The last token's query of a head, (1, head_dim), and all keys that it meets, (T, head_dim): turned, float32."""
    captured: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        def hook(value: Tensor, _start: int) -> None:  # of a text in pieces the last one stays
            captured[name] = value

        return hook

    places = {f"layers.{layer}.attention.{name}": keep(name) for name in "qk"}
    llama.engine.forward_with_hooks([ids], places, progress=progress)
    group = llama.args.n_heads // llama.args.n_kv_heads
    return captured["q"][0, head, -1:].float().cpu(), captured["k"][0, head // group].float().cpu()


def _turn(x: Tensor, freqs: Tensor, positions: Tensor) -> Tensor:
    """Vectors turned by their positions, (T, head_dim) and (T,) → (T, head_dim)."""
    return apply_rotary_emb(x[None, :, None], rotations(freqs, positions))[0, :, 0]


def _pairs(x: Tensor) -> list[complex]:
    """The complex numbers that a vector, (1, head_dim), is read as."""
    pairs: list[complex] = torch.view_as_complex(x[0].reshape(-1, 2)).tolist()
    return pairs


def _angle(z: complex) -> float:
    return math.atan2(z.imag, z.real) % math.tau
