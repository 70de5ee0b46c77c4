"""Weights of 32 and 16 bits, and GGUF's blocks: multiplied as the file holds them, mapped and not copied.

The kernels compute these products as cpp/rows.h does. Without kernels, torch's operators do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_scratch.config import ModelArgs
from llama_scratch.precision import kernels
from llama_scratch.precision.lazy_weight import Weight, kernel_operands

WEIGHTS_PER_BLOCK = 1 << 20
"""Weights that become float32 at a time: 4 MB, so that the product finds most of them in the CPU's cache."""

PRODUCT_BYTES = 4 * (6 << 20)
"""Memory that a product takes for one such block, with the copy that oneDNN makes of it."""

# Precisions in which GGUF's quantized blocks are read as the file holds them: neither loses anything of them.
_READ_BLOCKS = ("fp32", "fp16")
_SMALL_MODEL = 1 << 28  # weights: half a GB of float16

KernelOperand = tuple[tuple[Tensor, ...], str]
"""A weight as the kernels read it: its rows, or its panels' values and scales; and the name of that format."""


class Rows:
    """Weights as their file holds them, (out, in) each and below each other."""

    def __init__(self, weights: Sequence[Weight]):
        self.weights = list(weights)
        self.nbytes = sum(weight.nbytes for weight in weights)
        operands = [kernel_operands(weight) for weight in weights]
        self.kernel_operands: list[KernelOperand] = (
            [((tensor,), name) for parts in operands for tensor, name in parts] if all(operands) else []
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self.kernel_operands and kernels.ready() and x.device.type == "cpu":
            return kernels_product(x, self.kernel_operands)
        rows = x.reshape(-1, x.shape[-1]).to(product_type(x))  # (M, in)
        # A GPU has no use for small blocks, and each costs it a launch.
        step = max(1, WEIGHTS_PER_BLOCK // x.shape[-1]) if x.device.type == "cpu" else max(map(len, self.weights))
        blocks = (block for weight in self.weights for block in weight.split(step))
        out = torch.cat([product(rows, block.to(rows.dtype)) for block in blocks], dim=-1)  # (M, out)
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])


def reads_gguf_blocks(precision: str, args: ModelArgs) -> bool:
    """Whether GGUF's quantized blocks are multiplied as the file holds them.

    Without kernels that would be slow, so the blocks of a small model are converted then.
    """
    return precision in _READ_BLOCKS and (kernels.load() or args.n_parameters(tied=False) > _SMALL_MODEL)


def kernels_product(x: Tensor, operands: Sequence[KernelOperand]) -> Tensor:
    """x·Wᵀ by the kernels, of weights below each other: (…, in) → (…, out), in the type of x."""
    tensors = [tensor for parts, _ in operands for tensor in parts]
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    out = torch.ops.llama_scratch.linear(rows, tensors, [name for _, name in operands])
    return cast(Tensor, out).to(x.dtype).view(*x.shape[:-1], out.shape[-1])


def product_type(x: Tensor) -> torch.dtype:
    """The dtype that products of x are computed in: float32 on a CPU, on a GPU that of x."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x·Wᵀ of plain tensors in float32: (M, in) and (out, in) → (M, out).

    Torch asks MKL for it, which gives x86 CPUs that are not Intel's half of their speed; oneDNN does not.
    """
    if x.device.type == "cpu" and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
