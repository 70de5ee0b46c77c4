"""Meta directories with several shards, and pickles that run code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_scratch.config import ModelArgs
from tests.helpers.checkpoints import (
    TINY_MERGES,
    random_weights,
    tiny_args,
    tiny_params,
    tokenizer_file,
)

# Heads, key-value heads, feed-forward width and vocabulary size are all divisible by 8.
TOKENIZER = tokenizer_file() + b"dGhl 300\naGVy 301\nYW5k 302\naW5n 303\n"
VOCABULARY = 256 + len(TINY_MERGES) + 4 + 256
PARAMS = tiny_params(dim=128, n_layers=2, n_heads=16, n_kv_heads=8, vocab_size=VOCABULARY)
ARGS = tiny_args(**PARAMS)
TIED, UNTIED = True, False
Weights = dict[str, Tensor]


def shard(number: int) -> str:
    return f"consolidated.{number:02}.pth"


def axis_of(name: str, embedding: int) -> int | None:
    """The axis along which a weight is split, or None.

    ColumnParallelLinear splits the outputs (rows), RowParallelLinear the inputs. Norms are not split.

    Args:
        name: Name of the weight.
        embedding: 0 for Llama 3's VocabParallelEmbedding, 1 for Llama 2's ParallelEmbedding.
    """
    part = name.split(".")[-2]
    axes = dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0) | {"wo": 1, "w2": 1, "tok_embeddings": embedding}
    return axes.get(part)


def split(weights: Mapping[str, Tensor], n: int, embedding: int = 0) -> list[Weights]:
    """The weights that each of `n` ranks saves.

    Args:
        weights: The whole weights.
        n: Number of ranks.
        embedding: See `axis_of`.
    """
    shards: list[Weights] = [{} for _ in range(n)]
    for name, weight in weights.items():
        axis = axis_of(name, embedding)
        pieces = [weight] * n if axis is None else weight.chunk(n, axis)
        for part, piece in zip(shards, pieces, strict=True):
            part[name] = piece.clone()
    return shards


def weights_of(args: ModelArgs = ARGS, dtype: torch.dtype = torch.bfloat16, *, tied: bool = TIED) -> Weights:
    """Random weights, without the output weight if it is tied.

    Args:
        args: The dimensions of the network.
        dtype: Dtype of the weights.
        tied: Whether the output weight is the embedding.
    """
    weights = {name: weight.to(dtype) for name, weight in random_weights(args, tied=False).items()}
    if tied:
        del weights["output.weight"]
    return weights


def write(directory: Path, shards: Sequence[Mapping[str, Tensor]], params: Mapping[str, Any] = PARAMS) -> Path:
    """Write a Meta directory with these shards.

    Args:
        directory: Where to write it.
        shards: Weights of each shard.
        params: Contents of params.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(dict(params)))
    (directory / "tokenizer.model").write_bytes(TOKENIZER)
    for number, part in enumerate(shards):
        (directory / shard(number)).unlink(missing_ok=True)
        torch.save(dict(part), directory / shard(number))
    return directory


class Danger:
    """An object whose unpickling calls `function` with `arguments`."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call
