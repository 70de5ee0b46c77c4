"""What every format becomes: a shape, a tokenizer and, on demand, weights under Meta's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama_scratch.config import ModelArgs
from llama_scratch.errors import CheckpointError
from llama_scratch.progress import Progress
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """How a file holds its weights.

    types: number of tensors by type. tied: whether the output is the embedding itself.
    dtype: what `Checkpoint.load` gives the embedding as.
    """

    types: dict[str, int]
    tied: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk whose small files were read and checked.

    load: reads and checks the weights, under Meta's names. inspect: says how they are stored.
    """

    name: str
    format: str
    path: Path
    args: ModelArgs
    tokenizer: Tokenizer
    load: Callable[[Progress], dict[str, Tensor]]
    inspect: Callable[[Progress], Stored]

    def __post_init__(self) -> None:
        if self.tokenizer.n_vocab != self.args.vocab_size:
            raise CheckpointError(
                f"{self.path}: the tokenizer has {self.tokenizer.n_vocab} tokens and the model's embedding "
                f"{self.args.vocab_size}, expected the same number; use the tokenizer that came with the model."
            )


def checked(weights: dict[str, Tensor], args: ModelArgs, path: Path) -> dict[str, Tensor]:
    """The weights once names and shapes are right; a missing output becomes the embedding, as one tensor.

    Raises `CheckpointError` that names the file and the first weight that is wrong.
    """
    weights = dict(weights)
    embedding = weights.get("tok_embeddings.weight")
    output = weights.setdefault("output.weight", embedding) if embedding is not None else None
    shapes = args.weight_shapes()
    if missing := [name for name in shapes if name not in weights]:
        raise CheckpointError(
            f"{path} lacks {_some(missing)}, expected {len(shapes)} weights by its params; fetch the model again."
        )
    if unknown := [name for name in weights if name not in shapes]:
        raise CheckpointError(
            f"{path} holds {_some(unknown)}, expected no weight of that name in a Llama of this shape; "
            "check that weights and params belong to the same model."
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"{path}: {name} has the shape {tuple(weights[name].shape)}, expected {shape} by its params; "
                "check that weights and params belong to the same model."
            )
    if embedding is not None and output is not None and output.data_ptr() == embedding.data_ptr():
        weights["output.weight"] = embedding
    return weights


def is_tied(weights: dict[str, Tensor]) -> bool:
    """Whether the output projection is the embedding itself."""
    return weights["output.weight"] is weights["tok_embeddings.weight"]


def _some(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} and {len(names) - 1} more weights"
