"""Modules that replace torch's `nn.Linear` and `nn.Embedding`, and multiply weights in their own format.

Decoding one token reads every weight once, so its speed is the memory's bandwidth divided by the bytes per weight.
A `WeightFormat` is a function x → x·Wᵀ, (…, in) → (…, out), that knows its size. There are two:

    Rows       32 and 16 bits, and GGUF's blocks: as the file holds them, mapped and not copied (cpp/rows.h)
    Panels     8 or 4 bits and a scale per block, activations in blocks of 8 bits too (cpp/panels.h)

On a CPU both multiply in float32 whatever the type of x, with our kernels or, without them, with torch's operators;
on a GPU in the type of x.
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
        nbytes: Bytes that it reads for one row of x.
        kernel_operands: The weights below each other, as the kernels read them. Empty if no kernel knows them.
    """

    nbytes: int
    kernel_operands: list[KernelOperand]

    def __call__(self, x: Tensor) -> Tensor: ...


class PackedLinear(nn.Module):
    """Replaces an `nn.Linear`. Its format can be exchanged at any time for an equal one."""

    def __init__(self, format: WeightFormat):
        super().__init__()
        self.format = format

    def forward(self, x: Tensor) -> Tensor:
        return self.format(x)


class FusedOutput:
    """One product for linear layers that read the same x, such as wq, wk and wv, whose weights are read in one go.

    model.py calls these layers one by one with the same tensor. The first call computes the outputs of all, and each
    other call takes its own out of `_pending`. If that is not there, because x is another tensor or the output was
    taken already, the product is computed again: so results do not depend on the order of the calls, only time does.
    """

    def __init__(self, format: WeightFormat, sizes: Sequence[int]):
        self.format = format
        self._sizes = list(sizes)
        self._input: Tensor | None = None  # the x that `_pending` was computed from
        self._pending: dict[int, Tensor] = {}  # outputs that were not taken yet, by the layer's index

    def take(self, x: Tensor, part: int) -> Tensor:
        """Return the output of one of the layers, by its index."""
        if self._input is not x or part not in self._pending:
            self._pending = dict(enumerate(self.format(x).split(self._sizes, dim=-1)))
            self._input = x
        output = self._pending.pop(part)
        if not self._pending:
            self._input = None  # free its memory
        return output


class FusedLinearPart(nn.Module):
    """Replaces one of several `nn.Linear`s that read the same x."""

    def __init__(self, fused: FusedOutput, part: int):
        super().__init__()
        self.fused = fused
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.take(x, self.part)


def format_of(layer: nn.Module) -> WeightFormat | None:
    """The weight format of a layer that replaced a linear layer; fused layers share one."""
    if isinstance(layer, FusedLinearPart):
        return layer.fused.format
    return layer.format if isinstance(layer, PackedLinear) else None


class Differentiable(nn.Module):
    """Replaces an `nn.Linear` if gradients are wanted: with respect to x, never to the weight.

    x: (…, in) → (…, out). The weight stays as the file holds it, and one block at a time is float32, in the forward and
    in the backward pass.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(x, self.weight))


class _Product(torch.autograd.Function):
    """x·Wᵀ with the gradient g·W. The kernels' products have no gradient, and torch's own would keep W as float32."""

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
    """Bytes of weights that the linear layers of a network read for one token."""
    linear = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))
    formats = {id(format): format.nbytes for format in map(format_of, model.modules()) if format is not None}
    return linear + sum(formats.values())


class Embedding(nn.Module):
    """Replaces an `nn.Embedding`: rows of the table as it is stored, converted to `dtype`."""

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
