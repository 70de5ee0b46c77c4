"""Multiply mapped weights in their file's format: 32 and 16 bits, GGUF's blocks.

The kernels in cpp/rows.h compute these products. Without kernels, torch's operators do.
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
"""Weights to convert to float32 at a time: 4 MB, which mostly stay in the CPU's cache until they are multiplied."""

PRODUCT_BYTES = 4 * (6 << 20)
"""Temporary memory for multiplying one such block, including oneDNN's copy."""

# Precisions that multiply GGUF's quantized blocks directly, without loss.
_READ_BLOCKS = ("fp32", "fp16")
_SMALL_MODEL = 1 << 28  # number of weights: half a GB in float16

KernelOperand = tuple[tuple[Tensor, ...], str]
"""A weight for the kernels: its rows, or its panels' values and scales, and the name of the format."""


class Rows:
    """Weights in their file's format, (out, in) each, stacked along the rows."""

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
        # On a GPU, small blocks have no advantage, and each takes a kernel launch.
        step = max(1, WEIGHTS_PER_BLOCK // x.shape[-1]) if x.device.type == "cpu" else max(map(len, self.weights))
        blocks = (block for weight in self.weights for block in weight.split(step))
        out = torch.cat([product(rows, block.to(rows.dtype)) for block in blocks], dim=-1)  # (M, out)
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])


def reads_gguf_blocks(precision: str, args: ModelArgs) -> bool:
    """Whether GGUF's quantized blocks are multiplied directly.

    That is slow without kernels, so a small model's blocks are then converted to the precision's dtype instead.

    Args:
        precision: One of `PRECISIONS`.
        args: The network's dimensions.
    """
    return precision in _READ_BLOCKS and (kernels.load() or args.n_parameters(tied=False) > _SMALL_MODEL)


def kernels_product(x: Tensor, operands: Sequence[KernelOperand]) -> Tensor:
    """Compute x·Wᵀ with the kernels: (…, in) → (…, out) in the dtype of x.

    Args:
        x: Activations, (…, in).
        operands: Weights, stacked along the rows.
    """
    tensors = [tensor for parts, _ in operands for tensor in parts]
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    out = torch.ops.llama_scratch.linear(rows, tensors, [name for _, name in operands])
    return cast(Tensor, out).to(x.dtype).view(*x.shape[:-1], out.shape[-1])


def product_type(x: Tensor) -> torch.dtype:
    """Return the dtype for products of x: float32 on a CPU, the dtype of x on a GPU."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x·Wᵀ for tensors of the same dtype: (M, in) and (out, in) → (M, out).

    On a CPU, this calls oneDNN. torch would call MKL, which runs at half speed on x86 CPUs not made by Intel.

    Args:
        x: Activations, (M, in).
        weight: The weight, (out, in).
    """
    if x.device.type == "cpu" and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
