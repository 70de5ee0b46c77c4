"""Replacements for `nn.Linear` and `nn.Embedding` that use weights in any format.

Decoding is memory-bound: each token reads every weight once, so the speed is bandwidth divided by bytes per weight.
A `WeightFormat` is a function x → x·Wᵀ, (…, in) → (…, out), that knows its size. There are two formats:

    Rows       32 and 16 bits, and GGUF's blocks: memory-mapped, in the file's format (cpp/rows.h)
    Panels     8 or 4 bits with a scale per block; activations are rounded to 8 bits in blocks too (cpp/panels.h)

On a CPU, products are computed in float32 whatever the dtype of x, by the kernels if available, otherwise by torch's
operators. On a GPU, they are computed in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_scratch.precision import kernels
from llama_scratch.precision.lazy_weight import Weight, kernel_operands
from llama_scratch.precision.rows import WEIGHTS_PER_BLOCK, KernelOperand, Rows


class WeightFormat(Protocol):
    """A weight in some format, as a function x → x·Wᵀ.

    Attributes:
        nbytes: Bytes to read for one row of x.
        kernel_operands: The weights for the kernels, stacked along the rows. Empty if the kernels do not support them.
    """

    nbytes: int
    kernel_operands: list[KernelOperand]

    def __call__(self, x: Tensor) -> Tensor: ...


class PackedLinear(nn.Module):
    """Replaces an `nn.Linear`. Its weight format can be exchanged at any time."""

    def __init__(self, format: WeightFormat):
        super().__init__()
        self.format = format

    def forward(self, x: Tensor) -> Tensor:
        return self.format(x)


class FusedOutput:
    """One fused product for linear layers with the same input, such as wq, wk and wv.

    model.py calls these layers one by one with the same tensor x. The first call computes the outputs of all of them,
    and the other calls take theirs from `_pending`. If an output is missing there, because x is another tensor or the
    output was already taken, the product is computed again. So the order of the calls affects only the speed.
    """

    def __init__(self, format: WeightFormat, sizes: Sequence[int]):
        self.format = format
        self._sizes = list(sizes)
        self._input: Tensor | None = None  # the x that `_pending` was computed from
        self._pending: dict[int, Tensor] = {}  # index of a layer → output that it has not taken yet

    def take(self, x: Tensor, part: int) -> Tensor:
        """Return the output of one of the layers.

        Args:
            x: The input of all layers, (…, in).
            part: Index of the layer.
        """
        if self._input is not x or part not in self._pending:
            self._pending = dict(enumerate(self.format(x).split(self._sizes, dim=-1)))
            self._input = x
        output = self._pending.pop(part)
        if not self._pending:
            self._input = None  # free its memory
        return output


class FusedLinearPart(nn.Module):
    """Replaces one of several `nn.Linear`s with the same input."""

    def __init__(self, fused: FusedOutput, part: int):
        super().__init__()
        self.fused = fused
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.take(x, self.part)


def format_of(layer: nn.Module) -> WeightFormat | None:
    """Return the weight format of a replaced linear layer. Fused layers share one."""
    if isinstance(layer, FusedLinearPart):
        return layer.fused.format
    return layer.format if isinstance(layer, PackedLinear) else None


class Differentiable(nn.Module):
    """Replaces an `nn.Linear` for gradients with respect to x, not to the weight.

    x: (…, in) → (…, out). The weight stays in the file's dtype. The forward and backward passes convert one block of
    rows at a time to float32.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(x, self.weight))


class _Product(torch.autograd.Function):
    """The product x·Wᵀ, with the gradient g·W with respect to x.

    The kernels do not compute gradients. With torch's own operators, autograd would keep W as float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return Rows([weight])(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad, weight = grads[0], ctx.weight
        step = max(1, WEIGHTS_PER_BLOCK // weight.shape[1])
        blocks = zip(grad.split(step, dim=-1), weight.split(step), strict=True)
        return cast(Tensor, sum(part @ block.to(part.dtype) for part, block in blocks)), None


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that the linear layers read per decoded token."""
    linear = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))
    formats = {id(format): format.nbytes for format in map(format_of, model.modules()) if format is not None}
    return linear + sum(formats.values())


class Embedding(nn.Module):
    """Replaces an `nn.Embedding`: looks up rows in the stored format, then converts."""

    def __init__(self, weight: Weight, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False) if isinstance(weight, Tensor) else weight
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        if isinstance(self.weight, Tensor):
            return F.embedding(tokens, self.weight).to(self.dtype)
        if kernels.ready() and len(operands := kernel_operands(self.weight)) == 1:
            rows = torch.ops.llama_scratch.rows(*operands[0], tokens.flatten())
            return cast(Tensor, rows).view(*tokens.shape, -1).to(self.dtype)
        distinct, places = tokens.unique(return_inverse=True)
        rows = [self.weight.rows(id, id + 1) for id in distinct.tolist()]
        return torch.cat(rows)[places].to(self.dtype)
