"""The network's parts: their true shapes, what they hold and what they compute for one token."""

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
    """One kind of weight, or a step of attention, which has none.

    name: within a layer where `layered`, as in the checkpoint, such as "attention.wq". count: how many there are.
    shape: of each weight, (out, in) for a linear layer. parameters, flops: of all of them; flops for one token.
    """

    name: str
    layered: bool
    count: int
    shape: tuple[int, ...] | None
    parameters: int
    flops: int


@dataclass(frozen=True)
class Architecture(JsonResult):
    """A network's parts in the order in which a token comes by, and what a token costs.

    length: tokens that the newest one looks at, itself among them: attention costs more with each. tied: the output
    is the embedding, whose parameters count once. flops: multiplications and additions of the products, for one
    token. weight_bytes: read for it, as the weights are stored now. kv_bytes_per_token: what the cache keeps of each;
    with `length` of them it reads kv_bytes.
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
        """Of the whole network."""
        return sum(part.parameters for part in self.parts)

    @property
    def flops(self) -> int:
        """For one token."""
        return sum(part.flops for part in self.parts)

    @property
    def kv_bytes(self) -> int:
        """What attention reads for one token."""
        return self.length * self.kv_bytes_per_token


def architecture(llama: LoadedModel, length: int) -> Architecture:
    """The parts of a model, with the costs of a token that looks at `length` tokens, itself among them.

    Counted are two operations a weight for each product, and the attention's scores and mixing; what grows with dim
    and not with its square is left out: norms, rotation, softmax, SiLU, additions. Raises `UsageError` for a length
    that the context has no room for.
    """
    if not 1 <= length <= llama.context:
        raise UsageError(f"A length of {length:,} tokens was asked for, expected 1 to {llama.context:,}.")
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
    pairs = args.n_layers * args.n_heads * args.head_dim * length  # each head's query with each token's key
    parts = []
    for name, shape in shapes.items():
        layered = name.startswith("layers.0.")
        if name.startswith("layers.") and not layered:
            continue  # as in the first one
        short = name.removeprefix("layers.0.").removesuffix(".weight")
        count = args.n_layers if layered else 1
        weights = count * math.prod(shape)
        multiplied = len(shape) == 2 and short != "tok_embeddings"  # of the embedding one row is read
        held = 0 if tied and short == "output" else weights
        parts.append(WeightRow(short, layered, count, shape, held, 2 * weights if multiplied else 0))
        if short == "attention.wv":
            parts.append(WeightRow("attention.scores", True, args.n_layers, None, 0, 2 * pairs))
            parts.append(WeightRow("attention.mixing", True, args.n_layers, None, 0, 2 * pairs))
    return tuple(parts)
