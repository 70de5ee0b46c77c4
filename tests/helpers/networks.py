"""Small networks with random weights, and the distance of their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_scratch.config import ModelArgs
from llama_scratch.model import Transformer
from llama_scratch.precision.linear import (
    WeightFormat,
    format_of,
)
from tests.helpers.checkpoints import random_weights, tiny_args

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
IDS = torch.randint(556, (1, 48), generator=torch.Generator().manual_seed(0))


def stored(args: ModelArgs, dtype: torch.dtype = torch.bfloat16, *, tied: bool = True) -> dict[str, Tensor]:
    """Random weights as stored in a file.

    Args:
        args: The dimensions of the network.
        dtype: Dtype of the weights.
        tied: Whether the output weight is the embedding.
    """
    weights = random_weights(args, tied=False)
    held = {
        name: (weight if "wq" not in name and "wk" not in name else weight / 3).to(dtype)
        for name, weight in weights.items()
    }
    return held | {"output.weight": held["tok_embeddings.weight"]} if tied else held


def run(model: Transformer, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(ids, all_positions=True)[0]
        return logits


def reference(weights: dict[str, Tensor], args: ModelArgs | None = None) -> Tensor:
    """Logits of torch's own layers in float32."""
    model = Transformer(args or tiny_args())
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return run(model)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def forms(model: Transformer) -> list[WeightFormat]:
    """The distinct weight formats of a model: four per layer, and the output's."""
    return list({id(form): form for form in map(format_of, model.modules()) if form is not None}.values())
