"""The architecture of the network: shapes, parameters, FLOPs and bytes per token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llama_scratch.config import ModelArgs
from llama_scratch.errors import UsageError
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.precision.dtypes import activation_bytes
from llama_scratch.results import JsonResult


@dataclass(frozen=True)
class WeightRow:
    """One kind of weight, or a step of attention without weights.

    Attributes:
        name: As in the checkpoint, such as "attention.wq"; relative to the layer if `layered`.
        layered: Whether every layer has it.
        count: Number of them in the network.
        shape: Shape of each, (out, in) for a linear layer, if it has weights.
        parameters: Total number of parameters, 0 for an output that shares the weights of the embedding.
        flops: Total FLOPs for one token.
    """

    name: str
    layered: bool
    count: int
    shape: tuple[int, ...] | None
    parameters: int
    flops: int


@dataclass(frozen=True)
class Architecture(JsonResult):
    """The parts of a network in order of execution, and the cost of one token.

    Attributes:
        args: The hyperparameters.
        length: Number of tokens that the newest token attends to, including itself. Attention costs grow with it.
        tied: Whether the output shares its weights with the embedding. Shared weights count once.
        parts: The weights and steps.
        weight_bytes: Bytes of weights read per token, as they are stored now.
        kv_bytes_per_token: Bytes that the KV cache holds per token.
    """

    json_fields = (
        "args as shape",
        "length",
        "tied as tied_output",
        "parts",
        "parameters",
        "flops as flops_per_token",
        "weight_bytes",
        "kv_bytes_per_token",
        "kv_bytes",
    )

    args: ModelArgs
    length: int
    tied: bool
    parts: tuple[WeightRow, ...]
    weight_bytes: int
    kv_bytes_per_token: int

    @property
    def parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(part.parameters for part in self.parts)

    @property
    def flops(self) -> int:
        """Multiplications and additions in matrix products, for one token."""
        return sum(part.flops for part in self.parts)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache that attention reads for one token."""
        return self.length * self.kv_bytes_per_token


def architecture(llama: LoadedModel, length: int) -> Architecture:
    """Return the parts of a network with the cost of one token.

    Each matrix product costs two FLOPs per weight. The attention scores and the weighted sum of the values are added.
    Norms, rotation, softmax, SiLU and additions are not counted: their cost grows with dim, not with its square.

    Args:
        llama: The model.
        length: Number of tokens that the token attends to, including itself.

    Raises:
        UsageError: If `length` does not fit into the context.
    """
    if not 1 <= length <= llama.context:
        raise UsageError(f"The length must be from 1 to {llama.context:,} tokens, not {length:,}.")
    args = llama.args
    tied = llama.info.parameters == args.n_parameters(tied=True)
    return Architecture(
        args=args,
        length=length,
        tied=tied,
        parts=_parts(args, length, tied=tied),
        weight_bytes=llama.weight_bytes,
        kv_bytes_per_token=args.kv_bytes_per_token(activation_bytes(llama.engine.model)),
    )


def _parts(args: ModelArgs, length: int, *, tied: bool) -> tuple[WeightRow, ...]:
    shapes = args.weight_shapes()
    pairs = args.n_layers * args.n_heads * args.head_dim * length  # per head, one query with the key of each token
    parts = []
    for name, shape in shapes.items():
        layered = name.startswith("layers.0.")
        if name.startswith("layers.") and not layered:
            continue  # all layers have the same shapes
        short = name.removeprefix("layers.0.").removesuffix(".weight")
        count = args.n_layers if layered else 1
        weights = count * math.prod(shape)
        multiplied = len(shape) == 2 and short != "tok_embeddings"  # only one row of the embedding is read
        held = 0 if tied and short == "output" else weights
        parts.append(WeightRow(short, layered, count, shape, held, 2 * weights if multiplied else 0))
        if short == "attention.wv":
            parts.append(WeightRow("attention.scores", True, args.n_layers, None, 0, 2 * pairs))
            parts.append(WeightRow("attention.mixing", True, args.n_layers, None, 0, 2 * pairs))
    return tuple(parts)
