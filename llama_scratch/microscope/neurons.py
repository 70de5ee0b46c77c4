"""The strongest feed-forward neurons of a layer at the last token."""

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

# Number of columns of w2 read at a time.
_COLUMNS = 512
_PROMOTED, _SUPPRESSED = 3, 2


@dataclass(frozen=True)
class LogitEffect(Token):
    """A token whose logit a neuron raises or lowers.

    Attributes:
        logit: The direct effect on its logit.
    """

    logit: float


@dataclass(frozen=True)
class Neuron:
    """One neuron at the last token.

    Attributes:
        index: The neuron.
        activation: silu(w1 x) · w3 x.
        strength: |activation| · ‖column of w2‖, the norm of its output.
        contribution: Its direct contribution to the logit of the predicted token.
        promoted: The tokens whose logits it raises most.
        suppressed: The tokens whose logits it lowers most.
    """

    index: int
    activation: float
    strength: float
    contribution: float
    promoted: tuple[LogitEffect, ...]
    suppressed: tuple[LogitEffect, ...]


@dataclass(frozen=True)
class Neurons(Displayable, JsonResult):
    """The strongest neurons of a layer, strongest first.

    Attributes:
        layer: The layer.
        token: The last token of the text.
        answer: The predicted token.
        contribution: Direct contribution of the whole feed-forward network, the sum over all its neurons.
        neurons: The strongest neurons.
        n_neurons: Number of neurons of the layer.
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
    """Return the neurons of a layer with the largest output norm at the last token.

    A neuron adds its activation times its column of w2 to the residual stream. For its direct effect on the logits,
    that vector goes through the final norm, at the scale of the final stream, and the unembedding. Later layers are
    ignored. Raises the same errors as `Llama.predict`. Source: Geva et al. 2022, arXiv:2203.14680.

    Args:
        llama: The model.
        ids: The token ids of the text.
        layer: The layer.
        count: Number of neurons.
        progress: As for `Llama.predict`.

    Raises:
        UsageError: If the layer does not exist, or `count` is less than 1.
    """
    model, args = llama.engine.model, llama.args
    layer = numbered("layer", layer, args.n_layers)
    if count < 1:
        raise UsageError(f"The number of neurons must be at least 1, not {count}.")
    places = (
        f"layers.{layer}.feed_forward.neurons",
        f"layers.{layer}.feed_forward.out",
        f"layers.{args.n_layers - 1}.resid_post",
    )
    captured: dict[str, Tensor] = {}
    hooks = {place: _last(captured, place) for place in places}
    logits = llama.engine.forward_with_hooks([ids], hooks, progress=progress)[0, -1]
    activations, out, stream = (captured[place] for place in places)  # (ffn_dim,), (dim,), (dim,)
    answer = llama.candidates(logits, 1)[0]
    w2, dtype = cast(TransformerBlock, model.layers[layer]).feed_forward.w2, model.norm.weight.dtype
    lengths = []
    for part in torch.split(torch.arange(args.ffn_dim, device=activations.device), _COLUMNS):
        progress("neurons", int(part[0]), args.ffn_dim)
        lengths.append(columns(w2, part, args.ffn_dim, dtype).norm(dim=-1))
    strengths = activations.abs() * torch.cat(lengths)  # (ffn_dim,)
    best = strengths.topk(min(count, args.ffn_dim))
    writes = activations[best.indices, None] * columns(w2, best.indices, args.ffn_dim, dtype)  # (count, dim)
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
    """Return columns of w2: the outputs of neurons at an activation of 1.

    The columns of packed weights cannot be accessed. They are multiplied with one-hot rows instead.

    Args:
        w2: The linear layer.
        neurons: Their indices, (n,).
        ffn_dim: Number of neurons of the layer.
        dtype: The dtype of the activations.

    Returns:
        (n, dim) float32.
    """
    if isinstance(w2, nn.Linear):
        return w2.weight.T[neurons].float()
    return cast(Tensor, w2(F.one_hot(neurons, ffn_dim).to(dtype))).float()


@torch.inference_mode()
def _read(model: Transformer, writes: Tensor, stream: Tensor) -> Tensor:
    """Return the direct effect of vectors in the residual stream on the logits.

    (n, dim) → (n, vocab_size), at the scale of the final stream.
    """
    norm = model.norm
    scale = torch.rsqrt(stream.pow(2).mean() + norm.eps)
    logits: Tensor = model.output((writes * scale * norm.weight).to(norm.weight.dtype))
    return logits.float().cpu()


def _last(activations: dict[str, Tensor], place: str) -> Hook:
    """A hook that keeps the activation at the last token, in float32."""

    def hook(value: Tensor, _start: int) -> None:
        activations[place] = value[0, -1].float()

    return hook


def _most(llama: LoadedModel, push: Tensor, count: int, *, largest: bool) -> tuple[LogitEffect, ...]:
    most = push.topk(min(count, push.numel()), largest=largest)
    return tuple(
        LogitEffect(id, llama.token(id).text, logit)
        for id, logit in zip(most.indices.tolist(), most.values.tolist(), strict=True)
    )
