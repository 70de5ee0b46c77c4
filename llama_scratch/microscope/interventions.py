"""Interventions on a running network: ablation, activation patching and steering.

Each is an `Intervention`: hooks with a label. `Llama.intervened` runs the network with them.
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


@dataclass(frozen=True, eq=False)  # hooks hold tensors, whose == is elementwise
class Intervention(JsonResult):
    """A change to the network.

    Attributes:
        label: A short name for the prompt of a session, such as -L5.H3.
        meaning: A sentence for the user.
        hooks: The hooks that make the change.
        recipe: The arguments from which `remake` recreates it, if any.
    """

    json_fields = ("label", "meaning")

    label: str
    meaning: str
    hooks: Mapping[str, Hook]
    recipe: Recipe | None = None


def changed(llama: AnyModel, interventions: Sequence[Intervention]) -> AnyModel:
    """Return a model with interventions.

    Args:
        llama: The model.
        interventions: The interventions, applied in this order.
    """
    for intervention in interventions:
        llama = llama.intervened(intervention.hooks)
    return llama


def remake(llama: LoadedModel, recipe: Recipe, progress: Progress = silent) -> Intervention:
    """Recreate an intervention from its recipe.

    Args:
        llama: The model without interventions.
        recipe: The recipe. It may come from an untrusted file, so every value is checked.
        progress: Called while the activations are computed.

    Raises:
        UsageError: If the network does not have that component, position or token.
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
    """Zero ablation: set the output of a component to 0.

    Args:
        llama: The model.
        part: The component.
    """
    del llama  # unused: all interventions have the model as first argument
    hooks = _set(part, dict.fromkeys(part.places, 0.0))
    return Intervention(f"-{part.name}", f"{part.name} is zero-ablated.", hooks, Recipe("ablate", part.name))


def mean_ablate(llama: LoadedModel, part: NetworkPart, ids: Sequence[int], progress: Progress = silent) -> Intervention:
    """Mean ablation: replace the output of a component by its mean over a text.

    This removes the information about individual tokens, but the values stay close to the training distribution.
    Source: Wang et al. 2022, arXiv:2211.00593, who average over other texts.

    Args:
        llama: The model.
        part: The component.
        ids: The token ids of the text.
        progress: As for `Llama.predict`.
    """
    values = zip(part.places, activations(llama, ids, part.places, progress), strict=True)
    means = {place: part.of(value).mean(0) for place, value in values}
    tokens = f"{len(ids):,} token{'s' if len(ids) != 1 else ''}"
    recipe = Recipe("mean_ablate", part.name, ids=tuple(ids))
    return Intervention(f"~{part.name}", f"{part.name} is its mean over {tokens}.", _set(part, means), recipe)


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
    """Activation patching: copy the activations of a component from another text.

    For a layer, the activations are the residual stream before it. Raises the same errors as `Llama.predict`. Sources:
    Vig et al. 2020, arXiv:2004.12265 (causal mediation); Meng et al. 2022, arXiv:2202.05262 (causal tracing).

    Args:
        llama: The model.
        part: The component.
        ids: The token ids of the other text.
        positions: Positions in the prompt → positions in the other text, both from 0.
        progress: As for `Llama.predict`.

    Raises:
        UsageError: If there are no positions, or if one does not exist.
    """
    llama.engine.check(ids)
    if not positions:
        raise UsageError("No position was given. Give at least one.")
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
    return Intervention(name, f"{name} is patched from '{_end(llama, ids)}'.", {part.place: hook}, recipe)


def _end(llama: LoadedModel, ids: Sequence[int]) -> str:
    """The end of a text, for a message."""
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
    """Add a steering vector to the residual stream after a layer, at every token.

    The vector is `scale` times the difference between the activations of two texts at their last tokens. Raises the
    same errors as `Llama.predict`. Sources: Turner et al. 2023, arXiv:2308.10248 (activation addition); Rimsky et al.
    2023, arXiv:2312.06681.

    Args:
        llama: The model.
        layer: The layer.
        scale: The factor of the vector.
        toward: The token ids of the text that the vector leads toward.
        away: The token ids of the text that it leads away from.
        progress: As for `Llama.predict`.

    Raises:
        UsageError: If the layer does not exist, or the scale is too large or not finite.
    """
    place = f"layers.{numbered('layer', layer, llama.args.n_layers)}.resid_post"
    if not abs(scale) <= sys.float_info.max:
        raise UsageError(f"The scale must be a finite number, not {sanitize(scale)}.")
    ends = [activations(llama, ids, [place], progress)[0][-1] for ids in (toward, away)]  # (dim,) each
    direction = scale * (ends[0] - ends[1])  # (dim,)
    if not torch.isfinite(direction.norm()):  # norms square the components
        raise UsageError(f"A scale of {scale:g} makes the steering vector overflow. Choose a smaller scale.")
    apart = next((i for i, (a, b) in enumerate(zip(toward, away, strict=False)) if a != b), -1)
    words = [sanitize(llama.token(ids[apart]).text.strip() or "␣", 12) for ids in (toward, away)]
    label = f"{scale:+g}·({words[0]}−{words[1]})@L{layer}"  # named by the first tokens that differ
    return Intervention(
        label,
        f"After layer {layer}, {scale:g} times the difference of the two texts is added at each token, "
        f"a vector of norm {float(direction.norm()):.3g}.",
        {place: lambda value, _start: value + direction.to(value)},
        Recipe("steer", layer=int(layer), scale=float(scale), ids=tuple(toward), away=tuple(away)),
    )
