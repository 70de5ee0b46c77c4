"""The feed-forward neurons of a layer: how active each is at the last token, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_scratch.errors import UsageError
from llama_scratch.hooks import Hook
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.display import Displayable
from llama_scratch.microscope.parts import numbered
from llama_scratch.model import Transformer, TransformerBlock
from llama_scratch.results import Candidate, JsonResult, Token
from llama_scratch.system.progress import Progress, silent

# Columns of w2 that are read at a time.
_COLUMNS = 512
_PROMOTED, _SUPPRESSED = 3, 2


@dataclass(frozen=True)
class LogitEffect(Token):
    """A token whose logit a neuron raises or lowers, and by how much."""

    logit: float


@dataclass(frozen=True)
class Neuron:
    """One neuron at the last token.

    activation: silu(w1 x) · w3 x. strength: |activation| · ‖its column of w2‖, the length of what it writes.
    contribution: its direct part of the answer's logit. promoted, suppressed: the tokens that it pushes most.
    """

    index: int
    activation: float
    strength: float
    contribution: float
    promoted: tuple[LogitEffect, ...]
    suppressed: tuple[LogitEffect, ...]


@dataclass(frozen=True)
class Neurons(Displayable, JsonResult):
    """The strongest neurons of a layer, strongest first, of `n_neurons`.

    token: the last one. answer: what the network says after it. contribution: the direct part of all of the layer's
    neurons, which is that of the feed-forward, of the answer's logit.
    """

    json_fields = ("layer", "token", "answer", "contribution", "neurons", "n_neurons as of")

    layer: int
    token: Token
    answer: Candidate
    contribution: float
    neurons: tuple[Neuron, ...]
    n_neurons: int


def neurons(
    llama: LoadedModel, ids: Sequence[int], layer: int, count: int = 10, progress: Progress = silent
) -> Neurons:
    """The `count` neurons of a layer that write most at the last token, by the length of what they write.

    A neuron writes its activation times its column of w2 into the residual stream. That is read as the network reads
    the stream at its end: divided by the root mean square that it has there, scaled by the final norm's weight,
    multiplied with the unembedding. It is the direct effect: what later layers make of it is left out.

    progress: as for `Llama.predict`. Raises `UsageError` for a layer that there is not, and as `Llama.predict` does.
    Source: Geva et al. 2022, arXiv:2203.14680.
    """
    model, args = llama.engine.model, llama.args
    layer = numbered("layer", layer, args.n_layers)
    if count < 1:
        raise UsageError(f"{count} neurons were asked for, expected at least 1.")
    places = (
        f"layers.{layer}.feed_forward.neurons",
        f"layers.{layer}.feed_forward.out",
        f"layers.{args.n_layers - 1}.resid_post",
    )
    captured: dict[str, Tensor] = {}
    logits = llama.engine.forward_with_hooks(
        [ids], {place: _last(captured, place) for place in places}, progress=progress
    )[0, -1]
    activations, out, stream = (captured[place] for place in places)  # (ffn_dim,), (dim,), (dim,)
    answer = llama.candidates(logits, 1)[0]
    w2 = cast(TransformerBlock, model.layers[layer]).feed_forward.w2
    lengths = []
    for part in torch.split(torch.arange(args.ffn_dim, device=activations.device), _COLUMNS):
        progress("neurons", int(part[0]), args.ffn_dim)
        lengths.append(columns(w2, part, args.ffn_dim, model.norm.weight.dtype).norm(dim=-1))
    strengths = activations.abs() * torch.cat(lengths)  # (ffn_dim,)
    best = strengths.topk(min(count, args.ffn_dim))
    writes = activations[best.indices, None] * columns(
        w2, best.indices, args.ffn_dim, model.norm.weight.dtype
    )  # (count, dim)
    pushes = _read(model, torch.cat([out[None], writes]), stream)  # (1 + count, vocab_size)
    return Neurons(
        layer=layer,
        token=llama.token(ids[-1]),
        answer=answer,
        contribution=float(pushes[0, answer.id]),
        neurons=tuple(
            Neuron(
                index=index,
                activation=float(activations[index]),
                strength=strength,
                contribution=float(push[answer.id]),
                promoted=_most(llama, push, _PROMOTED, largest=True),
                suppressed=_most(llama, push, _SUPPRESSED, largest=False),
            )
            for index, strength, push in zip(best.indices.tolist(), best.values.tolist(), pushes[1:], strict=True)
        ),
        n_neurons=args.ffn_dim,
    )


@torch.inference_mode()
def columns(w2: nn.Module, neurons: Tensor, ffn_dim: int, dtype: torch.dtype) -> Tensor:
    """What neurons write at an activation of 1, their columns of w2: indices (n,) → (n, dim) float32.

    dtype: of activations. A packed form does not show its columns, but multiplies with one-hot rows, which picks them.
    """
    if isinstance(w2, nn.Linear):
        return w2.weight.T[neurons].float()
    return cast(Tensor, w2(F.one_hot(neurons, ffn_dim).to(dtype))).float()


@torch.inference_mode()
def _read(model: Transformer, writes: Tensor, stream: Tensor) -> Tensor:
    """What vectors in the residual stream add to the logits, (n, dim) → (n, vocab_size), at the scale of the stream."""
    norm = model.norm
    scale = torch.rsqrt(stream.pow(2).mean() + norm.eps)
    logits: Tensor = model.output((writes * scale * norm.weight).to(norm.weight.dtype))
    return logits.float().cpu()


def _last(activations: dict[str, Tensor], place: str) -> Hook:
    """A hook that keeps what stands at the last token, in float32; of a text in pieces the last one stays."""

    def hook(value: Tensor, _start: int) -> None:
        activations[place] = value[0, -1].float()

    return hook


def _most(llama: LoadedModel, push: Tensor, count: int, *, largest: bool) -> tuple[LogitEffect, ...]:
    most = push.topk(min(count, push.numel()), largest=largest)
    return tuple(
        LogitEffect(id, llama.token(id).text, logit)
        for id, logit in zip(most.indices.tolist(), most.values.tolist(), strict=True)
    )
