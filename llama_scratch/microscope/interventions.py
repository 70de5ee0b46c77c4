"""Changes to the network while it runs: parts switched off, activations copied from another text, directions added.

Each is an `Intervention`: hooks, and the name by which it is known. `Llama.intervened` runs the network with them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.hooks import Hook
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.activations import activations
from llama_scratch.microscope.parts import NetworkPart, numbered
from llama_scratch.microscope.recipe import Recipe
from llama_scratch.results import JsonResult
from llama_scratch.system.progress import Progress, silent

AnyModel = TypeVar("AnyModel", bound=LoadedModel)


@dataclass(frozen=True, eq=False)  # hooks hold tensors, which do not compare as a whole
class Intervention(JsonResult):
    """A change to the network.

    label: Short, as the prompt shows it: -L5.H3.
    meaning: A sentence for the user.
    recipe: How to make it again with `remake`; None if it was made by hand.
    """

    json_fields = ("label", "meaning")

    label: str
    meaning: str
    hooks: Mapping[str, Hook]
    recipe: Recipe | None = None


def changed(llama: AnyModel, interventions: Sequence[Intervention]) -> AnyModel:
    """The model with all of these, the first ones first."""
    for intervention in interventions:
        llama = llama.intervened(intervention.hooks)
    return llama


def remake(llama: LoadedModel, recipe: Recipe, progress: Progress = silent) -> Intervention:
    """Make an intervention from its recipe.

    Args:
        llama: The model without interventions.
        recipe: It may come from a file; every value is checked.
        progress: Called while the activations are computed.

    Raises:
        UsageError: If this network does not have that part, position or token.
    """
    if recipe.kind == "steer":
        return steer(llama, recipe.layer, recipe.scale, recipe.ids, recipe.away, progress)
    part = NetworkPart.named(recipe.part, llama.args)
    if recipe.kind == "patch":
        return patch(llama, part, recipe.ids, dict(recipe.positions), progress)
    if recipe.kind == "mean_ablate":
        return mean_ablate(llama, part, recipe.ids, progress)
    return ablate(llama, part)


# --- Ablation ---------------------------------------------------------------------------------


def ablate(llama: LoadedModel, part: NetworkPart) -> Intervention:
    """Zero ablation: what a part writes into the residual stream is 0."""
    del llama  # as the other ones have it
    hooks = _set(part, dict.fromkeys(part.places, 0.0))
    return Intervention(f"-{part.name}", f"{part.name} writes nothing.", hooks, Recipe("ablate", part.name))


def mean_ablate(llama: LoadedModel, part: NetworkPart, ids: Sequence[int], progress: Progress = silent) -> Intervention:
    """Replace what a part writes by its mean over the tokens of a text: what it says of each is gone, and the values
    stay near those that the network was trained on.

    Source: Wang et al. 2022, arXiv:2211.00593, whose mean is over other texts.
    """
    values = zip(part.places, activations(llama, ids, part.places, progress), strict=True)
    means = {place: part.of(value).mean(0) for place, value in values}
    tokens = f"{len(ids):,} token{'s' if len(ids) != 1 else ''}"
    recipe = Recipe("mean_ablate", part.name, ids=tuple(ids))
    return Intervention(f"~{part.name}", f"{part.name} writes its mean over {tokens}.", _set(part, means), recipe)


def _set(part: NetworkPart, values: Mapping[str, Tensor | float]) -> dict[str, Hook]:
    def hook(new: Tensor | float, value: Tensor, _start: int) -> Tensor:
        value = value.clone()
        part.of(value)[...] = new
        return value

    return {place: partial(hook, new) for place, new in values.items()}


# --- Patching ---------------------------------------------------------------------------------


def patch(
    llama: LoadedModel, part: NetworkPart, ids: Sequence[int], positions: Mapping[int, int], progress: Progress = silent
) -> Intervention:
    """Copy a part's value, while another text is read, into this one's: of a layer the residual stream before it.

    ids: of the other text. positions: here → there, both from 0. Raises `UsageError` for a position that it has not,
    and as `Llama.predict` does.
    Source: Vig et al. 2020, arXiv:2004.12265 (causal mediation); Meng et al. 2022, arXiv:2202.05262 (causal tracing).
    """
    llama.engine.check(ids)
    if not positions:
        raise UsageError("No position was given, expected at least one.")
    positions = {
        numbered("position", here, llama.context): numbered("position", there, len(ids), " in the other text")
        for here, there in positions.items()
    }
    (values,) = activations(llama, ids, [part.place], progress)  # (T, …)
    source = part.of(values)

    def hook(value: Tensor, start: int) -> Tensor:
        value = value.clone()
        for here, there in positions.items():
            if start <= here < start + value.shape[1]:
                part.of(value)[:, here - start] = source[there]
        return value

    where = "all" if 1 < len(ids) == len(positions) else ",".join(map(str, positions))
    name = f"{part.name}@{where}"
    recipe = Recipe("patch", part.name, ids=tuple(ids), positions=tuple(positions.items()))
    return Intervention(name, f"{name} holds what '{_end(llama, ids)}' has there.", {part.place: hook}, recipe)


def _end(llama: LoadedModel, ids: Sequence[int]) -> str:
    """The end of a text, for a sentence about it."""
    text = "".join(llama.token(id).text for id in ids[-8:])
    return sanitize(f"…{text}" if len(ids) > 8 else text, 60)


# --- Steering ---------------------------------------------------------------------------------


def steer(
    llama: LoadedModel,
    layer: int,
    scale: float,
    toward: Sequence[int],
    away: Sequence[int],
    progress: Progress = silent,
) -> Intervention:
    """Add a direction to the residual stream behind a layer, at every token: `scale` times the difference between what
    stands there at the last token of two texts.

    Raises `UsageError` for a layer that there is not or a scale that is too large, and as `Llama.predict` does.
    Source: Turner et al. 2023, arXiv:2308.10248 (activation addition); Rimsky et al. 2023, arXiv:2312.06681.
    """
    place = f"layers.{numbered('layer', layer, llama.args.n_layers)}.resid_post"
    if not abs(scale) <= sys.float_info.max:
        raise UsageError(f"The scale is {sanitize(scale)}, expected a finite number.")
    ends = [activations(llama, ids, [place], progress)[0][-1] for ids in (toward, away)]  # (dim,) each
    direction = scale * (ends[0] - ends[1])  # (dim,)
    if not torch.isfinite(direction.norm()):  # whose square a layer takes
        raise UsageError(f"A scale of {scale:g} makes the direction too long for numbers, expected a smaller one.")
    apart = next((i for i, (a, b) in enumerate(zip(toward, away, strict=False)) if a != b), -1)
    words = [sanitize(llama.token(ids[apart]).text.strip() or "␣", 12) for ids in (toward, away)]
    label = f"{scale:+g}·({words[0]}−{words[1]})@L{layer}"  # named by the first tokens that differ
    return Intervention(
        label,
        f"Behind layer {layer} each token gets {scale:g} times the difference of the two texts, "
        f"a vector of length {float(direction.norm()):.3g}.",
        {place: lambda value, _start: value + direction.to(value)},
        Recipe("steer", layer=int(layer), scale=float(scale), ids=tuple(toward), away=tuple(away)),
    )
