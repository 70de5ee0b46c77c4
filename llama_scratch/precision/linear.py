"""The forms of a linear layer: how its weight lies in memory, and how a row of activations is multiplied with it.

Decoding one token reads every weight once, so its speed is the memory's speed divided by the bytes of a
weight. A form is a function x → x·Wᵀ, (…, in) → (…, out), that knows its size:

    Rows       32 and 16 bits, and GGUF's blocks: as the file holds them, mapped and not copied (cpp/rows.h)
    Panels     8 or 4 bits and a scale a block, activations in blocks of 8 bits too (cpp/panels.h)

On a CPU both multiply in float32 whatever the type of x, with our kernels or, where there are none, with torch's
operators; on a GPU in the type of x.
`PackedLinear` puts them in the place of an `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_scratch.precision import kernels
from llama_scratch.precision.lazy_weight import LazyWeight, Weight, stored
from llama_scratch.precision.quantize import BLOCK, CALIBRATED, Hessian, dequantize, quantize_blocks, quantize_panels

# Weights that are turned into float32 at a time: 4 MB, so that the product finds most of them in the CPU's cache.
_BLOCK = 1 << 20


KernelOperand = tuple[tuple[Tensor, ...], str]
"""A weight as the kernels read it: its rows, or the values and scales of its panels; and the name of that form."""


class WeightFormat(Protocol):
    """x → x·Wᵀ. nbytes: what it reads for one row of x. stored: weights below each other; none where no kernel is."""

    nbytes: int
    stored: list[KernelOperand]

    def __call__(self, x: Tensor) -> Tensor: ...


def kernels_product(x: Tensor, weights: Sequence[KernelOperand]) -> Tensor:
    """x·Wᵀ of the weights that a form stores, below each other: (…, in) → (…, out), in the type of x."""
    tensors = [tensor for parts, _ in weights for tensor in parts]
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    out = torch.ops.llama_scratch.linear(rows, tensors, [name for _, name in weights])
    return cast(Tensor, out).to(x.dtype).view(*x.shape[:-1], out.shape[-1])


# --- Rows -------------------------------------------------------------------------------------


class Rows:
    """Weights as their file holds them, (out, in) each and below each other."""

    def __init__(self, weights: Sequence[Weight]):
        self.weights = list(weights)
        self.nbytes = sum(weight.nbytes for weight in weights)
        parts = [stored(weight) for weight in weights]
        self.stored: list[KernelOperand] = (
            [((tensor,), name) for part in parts for tensor, name in part] if all(parts) else []
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self.stored and kernels.ready() and x.device.type == "cpu":
            return kernels_product(x, self.stored)
        rows = x.reshape(-1, x.shape[-1]).to(_type_of(x))  # (M, in)
        # A GPU has no use for small blocks, and each costs it a launch.
        step = max(1, _BLOCK // x.shape[-1]) if x.device.type == "cpu" else max(map(len, self.weights))
        blocks = (block for weight in self.weights for block in weight.split(step))
        out = torch.cat([product(rows, block.to(rows.dtype)) for block in blocks], dim=-1)  # (M, out)
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])


def _type_of(x: Tensor) -> torch.dtype:
    """What products of x are computed in."""
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


# --- Panels -----------------------------------------------------------------------------------

# Weights that are put into panels at a time: what is made of them on the way is as much again, some times over.
PACKED = 1 << 22
# Rows of a panel, and inputs that stand together in it, see cpp/panels.h.
_ROWS, _GROUP = 16, 4


class Panels:
    """Blocks of 8 or 4 bits, multiplied as cpp/panels.h says; where there are no kernels, as float32.

    values, scales: from `to_panels`. shape: (out, in) of the weight, without what only fills a panel or a block.
    """

    def __init__(self, values: Tensor, scales: Tensor, shape: tuple[int, int]):
        self.values = values
        self.scales = scales
        self.shape = shape
        self.nbytes = values.nbytes + scales.nbytes
        bits = 8 if values.dtype == torch.int8 else 4
        self.stored: list[KernelOperand] = [((values, scales), f"int{bits}")]
        self.whole = panel_shapes(shape, bits)[0][0] * _ROWS == shape[0] and shape[1] % BLOCK[bits] == 0
        self._filling = -shape[1] % BLOCK[bits]

    def __call__(self, x: Tensor) -> Tensor:
        filled = F.pad(x, (0, self._filling)) if self._filling else x
        if kernels.ready() and x.device.type == "cpu":
            out = kernels_product(filled, self.stored)
        else:
            rows = filled.reshape(-1, filled.shape[-1]).to(_type_of(x))  # (M, in)
            step = max(1, _BLOCK // rows.shape[1] // _ROWS)
            pieces = zip(self.values.split(step), self.scales.split(step), strict=True)
            out = torch.cat([product(rows, from_panels(*piece).to(rows.dtype)) for piece in pieces], dim=-1).to(x.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])[..., : self.shape[0]]


def panel_shapes(shape: tuple[int, int], bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a weight's values and scales in panels, see cpp/panels.h; rows and blocks are filled up."""
    panels, blocks = -(-shape[0] // _ROWS), -(-shape[1] // BLOCK[bits])
    return (panels, blocks * BLOCK[bits] * bits // (8 * _GROUP), _ROWS, _GROUP), (panels, blocks, _ROWS)


def to_panels(
    weights: Sequence[Weight],
    bits: int,
    curvature: Hessian | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Quantize weights, (out, in) each and below each other, into the order in which the kernels read them.

    curvature: of inputs that are filled up to whole blocks. before_each: called before some rows are taken; what it
    raises ends the work. Raises as `quantize_blocks` does.
    """
    filled = _Filled(weights, bits)
    numbers, steps = panel_shapes(filled.shape, bits)
    values = torch.empty(numbers, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(steps, dtype=torch.float16)
    panels = max(1, (CALIBRATED if curvature else PACKED) // filled.shape[1] // _ROWS)
    for i, part in enumerate(filled.split(panels * _ROWS)):
        before_each()
        found = slice(i * panels, (i + 1) * panels)
        if curvature is None and kernels.ready() and weights[0].device.type == "cpu":
            values[found], scales[found] = quantize_panels(part, bits)
        else:
            values[found], scales[found] = panels_of(*quantize_blocks(part, bits, curvature))
    return values, scales


def panels_of(numbers: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (out, in) and scales (out, in/block), as `quantize_blocks` makes them, in panels."""
    missing = -len(numbers) % _ROWS
    numbers, scales = F.pad(numbers, (0, 0, 0, missing)), F.pad(scales, (0, 0, 0, missing))
    groups = numbers.view(-1, _ROWS, numbers.shape[1] // _GROUP, _GROUP).transpose(1, 2)
    if numbers.dtype == torch.uint8:
        groups = groups[:, 0::2] | groups[:, 1::2] << 4
    return groups.contiguous(), scales.view(-1, _ROWS, scales.shape[1]).transpose(1, 2).contiguous()


def from_panels(values: Tensor, scales: Tensor) -> Tensor:
    """The weights that panels stand for, (panels · 16, in) float32."""
    if values.dtype == torch.uint8:
        values = torch.stack([values & 15, values >> 4], dim=2).flatten(1, 2)
    return dequantize(values.transpose(1, 2).flatten(2).flatten(0, 1), scales.transpose(1, 2).flatten(0, 1))


class _Filled(LazyWeight):
    """Weights below each other, with columns of zeros behind, so that their rows are a whole number of blocks."""

    def __init__(self, weights: Sequence[Weight], bits: int):
        out, width = sum(map(len, weights)), weights[0].shape[1]
        self._missing = -width % BLOCK[bits]
        super().__init__((out, width + self._missing), torch.float32, sum(weight.nbytes for weight in weights))
        self._weights = list(weights)

    def rows(self, start: int, stop: int) -> Tensor:
        parts, first = [], 0
        for weight in self._weights:
            begin, end = max(start - first, 0), min(stop - first, len(weight))
            if begin < end:
                part = weight.rows(begin, end) if isinstance(weight, LazyWeight) else weight[begin:end]
                parts.append(part.to(self.dtype))
            first += len(weight)
        return F.pad(torch.cat(parts), (0, self._missing)) if self._missing or len(parts) > 1 else parts[0]


# --- In the place of torch's layers -----------------------------------------------------------


class PackedLinear(nn.Module):
    """Stands in the place of an `nn.Linear`. Its form may be exchanged at any time for an equal one."""

    def __init__(self, form: WeightFormat):
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x)


class FusedOutput:
    """One product for projections that read the same x: computed for the first that asks, kept for the others.

    The network's text stays `wq(x)`, `wk(x)`, `wv(x)`, and their weights are read in one go.
    """

    def __init__(self, form: WeightFormat, sizes: Sequence[int]):
        self.form = form
        self._sizes = list(sizes)
        self._x: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def take(self, x: Tensor, part: int) -> Tensor:
        """The output of one of the projections."""
        if x is not self._x or part not in self._outputs:
            self._x = x
            self._outputs = dict(enumerate(self.form(x).split(self._sizes, dim=-1)))
        output = self._outputs.pop(part)
        if not self._outputs:
            self._x = None  # nothing is held longer than it is needed
        return output


class FusedLinearPart(nn.Module):
    """Stands in the place of one of several `nn.Linear`s that read the same x."""

    def __init__(self, shared: FusedOutput, part: int):
        super().__init__()
        self.shared = shared
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.take(x, self.part)


def format_of(layer: nn.Module) -> WeightFormat | None:
    """The form that stands in the place of a linear layer; that of several, for each of them."""
    if isinstance(layer, FusedLinearPart):
        return layer.shared.form
    return layer.form if isinstance(layer, PackedLinear) else None


class Differentiable(nn.Module):
    """Stands in the place of an `nn.Linear` where gradients are wanted: with respect to x, never to the weight.

    x: (…, in) → (…, out). The weight stays as it lies in the file, and is float32 a block at a time, on the way there
    and on the way back.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(x, self.weight))


class _Product(torch.autograd.Function):
    """x·Wᵀ, of which ∂/∂x is g·W. The kernels' products have no gradient, and torch's own would keep W as float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return Rows([weight])(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad, weight = grads[0], ctx.weight
        step = max(1, _BLOCK // weight.shape[1])
        blocks = zip(grad.split(step, dim=-1), weight.split(step), strict=True)
        return cast(Tensor, sum(part @ block.to(part.dtype) for part, block in blocks)), None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that the linear layers of a network read for one token."""
    linear = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))
    forms = {id(form): form.nbytes for form in map(format_of, model.modules()) if form is not None}
    return linear + sum(forms.values())


class Embedding(nn.Module):
    """Rows of a table as it is stored, given out as `dtype`."""

    def __init__(self, weight: Weight, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False) if isinstance(weight, Tensor) else weight
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        if isinstance(self.weight, Tensor):
            return F.embedding(tokens, self.weight).to(self.dtype)
        if kernels.ready() and len(parts := stored(self.weight)) == 1:
            rows = torch.ops.llama_scratch.rows(*parts[0], tokens.flatten())
            return cast(Tensor, rows).view(*tokens.shape, -1).to(self.dtype)
        distinct, places = tokens.unique(return_inverse=True)
        rows = [self.weight.rows(id, id + 1) for id in distinct.tolist()]
        return torch.cat(rows)[places].to(self.dtype)
