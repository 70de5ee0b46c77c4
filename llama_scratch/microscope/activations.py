"""Activations of the residual stream, and the layers as functions of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.hooks import Hook
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.model import KVCache, Transformer, causal_mask, rotations
from llama_scratch.system.progress import Progress, silent


def keep(into: list[Tensor], positions: slice = slice(None)) -> Hook:
    """Return a hook that records activations.

    Args:
        into: The list that each recorded value is appended to.
        positions: The positions to record, by default all of them.
    """

    def hook(value: Tensor, _start: int) -> None:
        into.append(value[:, positions].detach().clone())

    return hook


def activations(
    llama: LoadedModel, ids: Sequence[int], places: Sequence[str], progress: Progress = silent
) -> list[Tensor]:
    """Record the activations at some places of the network while it reads a text.

    The chunks of a long text are concatenated. Raises the same errors as `Llama.predict`.

    Args:
        llama: The model.
        ids: The token ids of the text.
        places: The places, named as in `llama_scratch.hooks`.
        progress: As for `Llama.predict`.

    Returns:
        One tensor per place, without the batch dimension.

    Raises:
        UsageError: If a place does not exist, or its values have heads as their first dimension (q, k, v and probs).
    """
    if wrong := [place for place in places if place.endswith((".q", ".k", ".v", ".probs"))]:
        raise UsageError(f"Activations at {sanitize(wrong[0])} have heads as their first dimension. Use another place.")
    pieces_by_place: list[list[Tensor]] = [[] for _ in places]
    hooks = {place: keep(pieces) for place, pieces in zip(places, pieces_by_place, strict=True)}
    everywhere = not {"norm", "logits"}.isdisjoint(places)  # by default computed only for the last position
    llama.engine.forward_with_hooks([ids], hooks, all_positions=everywhere, progress=progress)
    return [torch.cat(pieces, dim=1)[0] for pieces in pieces_by_place]


def residuals(llama: LoadedModel, ids: Sequence[int], progress: Progress = silent) -> Tensor:
    """Return the residual stream before each layer and after the last one.

    Args:
        llama: The model.
        ids: The token ids of the text.
        progress: As for `Llama.predict`.

    Returns:
        The stream, (n_layers + 1, T, dim).
    """
    n_layers = llama.args.n_layers
    places = [f"layers.{layer}.resid_pre" for layer in range(n_layers)] + [f"layers.{n_layers - 1}.resid_post"]
    return torch.stack(activations(llama, ids, places, progress))


def layers(model: Transformer, T: int) -> list[Callable[[Tensor], Tensor]]:
    """Return the layers as functions of the residual stream of a whole text.

    Args:
        model: The network.
        T: Number of tokens in the text.

    Returns:
        One function per layer, (B, T, dim) → (B, T, dim).
    """
    device = model.freqs.device
    freqs_cis, mask = rotations(model.freqs, torch.arange(T, device=device)), causal_mask(T, T, device)

    def run(layer: int, x: Tensor) -> Tensor:
        stream: Tensor = model.layers[layer](x, freqs_cis, mask, KVCache(model.args, T), layer)
        return stream

    return [lambda x, layer=layer: run(layer, x) for layer in range(model.args.n_layers)]  # type: ignore[misc]
