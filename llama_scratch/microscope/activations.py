"""The residual stream: what it holds before each layer, and what the layers make of one that was changed."""

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
    """A hook that reads: each value that comes by is put into a list, as it was at these positions."""

    def hook(value: Tensor, _start: int) -> None:
        into.append(value[:, positions].detach().clone())

    return hook


def activations(
    llama: LoadedModel, ids: Sequence[int], places: Sequence[str], progress: Progress = silent
) -> list[Tensor]:
    """What stands at some places of the network while it reads a text: a tensor a place, without the B in front.

    For a long text the pieces are put together. Raises as `Llama.predict` does, and `UsageError` for a place that there
    is not, and for q, k, v and probs, whose first size is heads.
    """
    if wrong := [place for place in places if place.endswith((".q", ".k", ".v", ".probs"))]:
        raise UsageError(f"What stands at {sanitize(wrong[0])} has heads in front of tokens, expected another place.")
    pieces_by_place: list[list[Tensor]] = [[] for _ in places]
    hooks = {place: keep(pieces) for place, pieces in zip(places, pieces_by_place, strict=True)}
    everywhere = not {"norm", "logits"}.isdisjoint(places)  # which else stand behind the last token alone
    llama.engine.forward_with_hooks([ids], hooks, all_positions=everywhere, progress=progress)
    return [torch.cat(pieces, dim=1)[0] for pieces in pieces_by_place]


def residuals(llama: LoadedModel, ids: Sequence[int], progress: Progress = silent) -> Tensor:
    """The stream before each layer and behind the last: (n_layers + 1, T, dim)."""
    n_layers = llama.args.n_layers
    places = [f"layers.{layer}.resid_pre" for layer in range(n_layers)] + [f"layers.{n_layers - 1}.resid_post"]
    return torch.stack(activations(llama, ids, places, progress))


def layers(model: Transformer, T: int) -> list[Callable[[Tensor], Tensor]]:
    """The network's layers as functions of the stream of a whole text, (B, T, dim) → (B, T, dim)."""
    device = model.freqs.device
    freqs_cis, mask = rotations(model.freqs, torch.arange(T, device=device)), causal_mask(T, T, device)

    def run(layer: int, x: Tensor) -> Tensor:
        stream: Tensor = model.layers[layer](x, freqs_cis, mask, KVCache(model.args, T), layer)
        return stream

    return [lambda x, layer=layer: run(layer, x) for layer in range(model.args.n_layers)]  # type: ignore[misc]
