"""Rotary position embedding: frequencies, angles, and rotated queries and keys."""

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

# The factor that models without scaling are compared with: that of Llama 3.2 1B and 3B.
_FACTOR = 32.0
# Maximum number of keys shown.
_NEAREST = 24


@dataclass(frozen=True)
class RotaryPair(JsonResult):
    """One pair of dimensions of a head, with the unscaled and the scaled frequency.

    Attributes:
        pair: The index of the pair.
        unscaled: Radians per token without scaling.
        scaled: Radians per token with scaling.
        kind: Effect of the scaling on the frequency: "kept", "smoothed" or "divided".
        unscaled_angle: The angle at the position, 0 to 2π, in float32 like the network.
        scaled_angle: The same with scaling.
    """

    pair: int
    unscaled: float
    scaled: float
    kind: str
    unscaled_angle: float
    scaled_angle: float

    @property
    def unscaled_wavelength(self) -> float:
        """Tokens per full rotation, without scaling."""
        return math.tau / self.unscaled

    @property
    def scaled_wavelength(self) -> float:
        """Tokens per full rotation, with scaling."""
        return math.tau / self.scaled

    def as_json(self) -> dict[str, Any]:
        """Return the pair as part of `Rope.as_json`."""
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
class Hands:
    """The angles of all pairs at a position, from the network's own frequencies.

    Attributes:
        position: The position.
        angles: The angle of each pair, 0 to 2π, in float32 like the network.
    """

    position: int
    angles: tuple[float, ...]


@dataclass(frozen=True)
class RotatedPair:
    """One pair of the query, before and after rotation.

    Attributes:
        pair: The index of the pair.
        length: Its norm, which rotation preserves.
        before: Its angle before rotation, 0 to 2π.
        after: Its angle after rotation.
    """

    pair: int
    length: float
    before: float
    after: float


@dataclass(frozen=True)
class KeyScore:
    """The attention score of a key.

    Attributes:
        token: The token of the key.
        distance: Distance to the query in tokens.
        product: q·k/√head_dim, the input of the softmax.
        unturned: The same score without the rotations, so it does not depend on the distance.
    """

    token: Token
    distance: int
    product: float
    unturned: float


@dataclass(frozen=True)
class Rope(Displayable, JsonResult):
    """The rotary embedding at a position, and the last token's query of one head.

    Attributes:
        theta: The base of the frequencies.
        scales: Whether the network scales its frequencies. If not, it uses the unscaled values.
        factor: The scaling factor. If the network does not scale its frequencies, the factor of Llama 3.2.
        position: The position of the angles in `dials`. `query` is rotated to it.
        dials: Frequencies and angles of all pairs.
        context: Number of tokens of the context.
        hands: The network's own angles at position 1, at `position` and at the end of the context, in ascending order.
        slow_from: The first pair that makes less than one turn over the context. None: all pairs make at least one.
        layer: The layer.
        head: The head within the layer.
        token: The token of the query.
        length: ‖q‖, which rotation preserves.
        query: The pairs of the query.
        matches: Scores of the nearest keys with the query at its own position, nearest first.
        n_keys: Number of all keys.
    """

    json_fields = (
        "theta as rope_theta",
        "scales",
        "factor",
        "position",
        "dials",
        "context",
        "hands",
        "slow_from as first_pair_below_one_turn",
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
    context: int
    hands: tuple[Hands, ...]
    slow_from: int | None
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
    """Return the rotary embedding at a position, and the last query rotated to it.

    Raises the same errors as `Llama.predict`. Source: Su et al. 2021, arXiv:2104.09864.

    Args:
        llama: The model.
        ids: The token ids of the text.
        position: The position, by default that of the last token.
        layer: The layer.
        head: The head within the layer.
        progress: As for `Llama.predict`.

    Raises:
        UsageError: If the layer, head or position does not exist.
    """
    llama.engine.check(ids)
    args, last = llama.args, len(ids) - 1
    position = numbered("position", last if position is None else position, max(llama.context, SCALED_CONTEXT))
    layer, head = numbered("layer", layer, args.n_layers), numbered("head", head, args.n_heads)
    q, keys = _query_and_keys(llama, ids, layer, head, progress)  # (1, head_dim), (T, head_dim)
    freqs = rope_frequencies(args)  # (head_dim/2,)
    unturned = _turn(q, freqs, torch.tensor([-last]))  # rotation by the negative angle
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
        context=llama.context,
        hands=tuple(Hands(place, _angles(freqs, place)) for place in sorted({1, position, llama.context - 1})),
        slow_from=next((j for j, freq in enumerate(freqs.tolist()) if freq * llama.context < math.tau), None),
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
    """Return the frequencies and angles of all pairs at a position.

    If the model does not scale its frequencies, a factor of 32 is used for comparison.

    Args:
        args: The hyperparameters.
        position: The position.
    """
    factor = args.rope_scaling.factor if args.rope_scaling else _FACTOR
    columns = []
    for freqs in (rope_frequencies(args.with_rope_factor(factor)) for factor in (1.0, factor)):
        columns.append(zip(freqs.tolist(), _angles(freqs, position), strict=True))
    return tuple(
        RotaryPair(pair, unscaled, scaled, _kind(scaled / unscaled, factor), angle, scaled_angle)
        for pair, ((unscaled, angle), (scaled, scaled_angle)) in enumerate(zip(*columns, strict=True))
    )


def _angles(freqs: Tensor, position: int) -> tuple[float, ...]:
    return tuple(_angle(turn) for turn in rotations(freqs, torch.tensor([position]))[0].tolist())


def _kind(ratio: float, factor: float) -> str:
    # Compare with a tolerance: float32 rounding can change the last bit at both ends of the interpolation.
    if math.isclose(ratio, 1, rel_tol=1e-6):
        return "kept"
    return "divided" if math.isclose(ratio, 1 / factor, rel_tol=1e-6) else "smoothed"


def _query_and_keys(
    llama: LoadedModel, ids: Sequence[int], layer: int, head: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Return the last token's query of a head, and the keys of all tokens.

    Both are rotated and float32, (1, head_dim) and (T, head_dim).
    """
    captured: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        def hook(value: Tensor, _start: int) -> None:  # the last chunk of a long text remains
            captured[name] = value

        return hook

    places = {f"layers.{layer}.attention.{name}": keep(name) for name in "qk"}
    llama.engine.forward_with_hooks([ids], places, progress=progress)
    group = llama.args.n_heads // llama.args.n_kv_heads
    return captured["q"][0, head, -1:].float().cpu(), captured["k"][0, head // group].float().cpu()


def _turn(x: Tensor, freqs: Tensor, positions: Tensor) -> Tensor:
    """Rotate vectors to positions, (T, head_dim) and (T,) → (T, head_dim)."""
    return apply_rotary_emb(x[None, :, None], rotations(freqs, positions))[0, :, 0]


def _pairs(x: Tensor) -> list[complex]:
    """View a vector, (1, head_dim), as complex numbers."""
    pairs: list[complex] = torch.view_as_complex(x[0].reshape(-1, 2)).tolist()
    return pairs


def _angle(z: complex) -> float:
    return math.atan2(z.imag, z.real) % math.tau
