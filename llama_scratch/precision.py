"""How weights are stored and multiplied.

| name | weights  | activations | promise                       |
| ---- | -------- | ----------- | ----------------------------- |
| fp32 | float32  | float32     | the reference                 |
| bf16 | bfloat16 | bfloat16    | what Meta's own code computes |

`auto` is bf16 where the file holds bfloat16, and fp32 otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_scratch.errors import UsageError
from llama_scratch.memory import require_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_name(precision: str) -> None:
    """Raise `UsageError` for a `--precision` that there is not."""
    if precision not in ("auto", *DTYPES):
        raise UsageError(f"The precision is {precision!r}, expected auto, {' or '.join(DTYPES)} (--precision).")


def choose(precision: str, stored: torch.dtype) -> str:
    """The precision to run in: the one named, or for "auto" the one that fits how the weights are stored."""
    if precision == "auto":
        return "bf16" if stored == torch.bfloat16 else "fp32"
    return precision


def convert(weights: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    """The weights in `precision`: those that are in it already stay the same, mapped or shared tensors.

    A tensor that stands under two names (the tied output) is converted once.
    """
    dtype = DTYPES[precision]
    distinct = {id(tensor): tensor for tensor in weights.values() if tensor.dtype != dtype}
    require_memory(sum(t.numel() for t in distinct.values()) * dtype.itemsize, f"Converting to {precision}")
    converted = {key: tensor.to(dtype) for key, tensor in distinct.items()}
    return {name: converted.get(id(tensor), tensor) for name, tensor in weights.items()}
