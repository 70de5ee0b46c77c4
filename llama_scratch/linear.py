"""The forms of a linear layer: how its weight lies in memory, and how a row of activations is multiplied with it.

Decoding one token reads every weight once, so its speed is the memory's speed divided by the bytes of a
weight. Each form is a function x → x·Wᵀ, (…, in) → (…, out), that knows its size:

    Blocks     as in the file, mapped and not copied; blocks become float32 while they are multiplied. Ready at
               once and as true as fp32, but slow
    Half       2 bytes: float16 weights, float32 activations (fbgemm, x86)
    Int8       1 byte and a scale a row; activations in two steps of 7 bits (fbgemm, x86)
    Panels     8 or 4 bits and a scale a block, activations of 8 bits in blocks too (kernels.cpp)

`Projection` puts them in the place of an `nn.Linear`.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_scratch import kernels
from llama_scratch.lazy import Lazy, Weight
from llama_scratch.quantise import BLOCK, CALIBRATED, Curvature, dequantise, quantise_blocks, quantize_panels

# torch speaks of leaving this to another package; the range that is installed has it.
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)

# Weights that are turned into float32 at a time: 4 MB, so that the product finds most of them in the CPU's cache.
_BLOCK = 1 << 20

T = TypeVar("T")


class Form(Protocol):
    """x → x·Wᵀ. `nbytes`: what it reads for one row of x."""

    nbytes: int

    def __call__(self, x: Tensor) -> Tensor: ...


class Blocks:
    """Weights as they are, (out, in) each: a block of rows at a time is turned into the type of x and multiplied.

    scales: (out,) of each weight, for the rows of 8-bit integers.
    """

    def __init__(self, weights: Sequence[Weight], scales: Sequence[Tensor] | None = None):
        self.weights = list(weights)
        self.scales = None if scales is None else torch.cat(list(scales))
        self.nbytes = sum(weight.nbytes for weight in weights)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (M, in)
        # A GPU has no use for small blocks, and each costs it a launch.
        step = max(1, _BLOCK // x.shape[-1]) if x.device.type == "cpu" else max(map(len, self.weights))
        blocks = (block for weight in self.weights for block in _split(weight, step, x.dtype))
        out = torch.cat([product(rows, block) for block in _turned(blocks, x.dtype)], dim=-1)  # (M, out)
        if self.scales is not None:
            out *= self.scales.to(out.dtype)
        return out.view(*x.shape[:-1], -1)


def _split(weight: Weight, rows: int, dtype: torch.dtype) -> Sequence[Weight]:
    if isinstance(weight, Lazy):
        return weight.split(rows)
    return [weight] if weight.dtype == dtype else weight.split(rows)


def _turned(blocks: Iterator[Weight], dtype: torch.dtype) -> Iterator[Tensor]:
    """The blocks as tensors of `dtype`. What is not one yet takes longer than its product: threads work ahead."""
    ahead: deque[Future[Tensor]] = deque()
    for block in blocks:
        if isinstance(block, Tensor):
            yield from (future.result() for future in _emptied(ahead))
            yield block.to(dtype)
        else:
            ahead.append(_threads().submit(block.to, dtype))
            if len(ahead) > 2 * torch.get_num_threads():
                yield ahead.popleft().result()
    yield from (future.result() for future in _emptied(ahead))


def _emptied(queue: deque[T]) -> Iterator[T]:
    while queue:
        yield queue.popleft()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "dequantising")


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x·Wᵀ of plain tensors: (M, in) and (out, in) → (M, out).

    In float32 torch asks MKL, which gives x86 CPUs that are not Intel's half of their speed; oneDNN does not.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and packs():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


class Half:
    """float16 weights in fbgemm's own order, float32 activations and sums.

    weight: (out, in) of any float type; from bfloat16 nothing is lost but below 2⁻¹⁷.
    """

    def __init__(self, weight: Tensor):
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
        self.nbytes = 2 * weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self._packed)


class Int8:
    """8-bit weights with a scale a row, activations in two limbs of 7 bits, exact integer sums.

    One 8-bit scale for a row of activations loses what is not an outlier, and every Llama has outliers. So a
    row is written as x/s = x0 + x1/126, with x0 and x1 whole numbers between −63 and 63: 13 bits. Both limbs
    go through the same pass over the weights. 7 bits, because AVX2's 8-bit products saturate beyond.

    values: (out, in) int8; scales: (out,) float32, the size of one step of each row.
    """

    def __init__(self, values: Tensor, scales: Tensor):
        zeros = torch.zeros(len(values), dtype=torch.long)
        quantised = torch._make_per_channel_quantized_tensor(values, scales.double(), zeros, 0)
        self._packed = torch.ops.quantized.linear_prepack(quantised, None)
        self.nbytes = values.nbytes + scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        limbs, scale = _once(x, "_limbs", _limbs)
        y0, y1 = self._product(limbs[0]).chunk(2) if len(limbs) == 1 else map(self._product, limbs)
        return y0.add_(y1, alpha=1 / 126).mul_(scale).view(*x.shape[:-1], -1)

    def _product(self, x: Tensor) -> Tensor:
        """Round x, whole numbers from −64 to 63, and multiply: (M, in) → (M, out) float32."""
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, 64, self._packed)


# Weights that are put into panels at a time: what is made of them on the way is as much again, some times over.
PACKED = 1 << 22
# Rows of a panel, and inputs that stand together in it, see kernels.cpp.
_ROWS, _GROUP = 16, 4


class Panels:
    """Blocks of 8 or 4 bits, multiplied as kernels.cpp says; where there are no kernels, as float32.

    values, scales: from `to_panels`. shape: (out, in) of the weight, without what only fills a panel or a block.
    """

    def __init__(self, values: Tensor, scales: Tensor, shape: tuple[int, int]):
        self.values = values
        self.scales = scales
        self.shape = shape
        self.nbytes = values.nbytes + scales.nbytes
        bits = 8 if values.dtype == torch.int8 else 4
        self.whole = panel_shapes(shape, bits)[0][0] * _ROWS == shape[0] and shape[1] % BLOCK[bits] == 0
        self._filling = -shape[1] % BLOCK[bits]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # (M, in)
        if self._filling:
            rows = F.pad(rows, (0, self._filling))
        if kernels.ready() and x.device.type == "cpu" and x.dtype == torch.float32:
            out = torch.ops.llama_scratch.linear(rows, self.values, self.scales)
        else:
            step = max(1, _BLOCK // rows.shape[1] // _ROWS)
            pieces = zip(self.values.split(step), self.scales.split(step), strict=True)
            out = torch.cat([product(rows, from_panels(*piece).to(x.dtype)) for piece in pieces], dim=-1)
        return out[:, : self.shape[0]].reshape(*x.shape[:-1], self.shape[0])


def panel_shapes(shape: tuple[int, int], bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a weight's values and scales in panels, see kernels.cpp; rows and blocks are filled up."""
    panels, blocks = -(-shape[0] // _ROWS), -(-shape[1] // BLOCK[bits])
    return (panels, blocks * BLOCK[bits] * bits // (8 * _GROUP), _ROWS, _GROUP), (panels, blocks, _ROWS)


def to_panels(
    weights: Sequence[Weight],
    bits: int,
    curvature: Curvature | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Quantise weights, (out, in) each and below each other, into the order in which the kernels read them.

    curvature: of inputs that are filled up to whole blocks. before_each: called before some rows are taken; what it
    raises ends the work. Raises as `quantise_blocks` does.
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
            values[found], scales[found] = panels_of(*quantise_blocks(part, bits, curvature))
    return values, scales


def panels_of(numbers: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (out, in) and scales (out, in/block), as `quantise_blocks` makes them, in panels."""
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
    return dequantise(values.transpose(1, 2).flatten(2).flatten(0, 1), scales.transpose(1, 2).flatten(0, 1))


class _Filled(Lazy):
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
                part = weight.rows(begin, end) if isinstance(weight, Lazy) else weight[begin:end]
                parts.append(part.to(self.dtype))
            first += len(weight)
        return F.pad(torch.cat(parts), (0, self._missing)) if self._missing or len(parts) > 1 else parts[0]


def _limbs(x: Tensor) -> tuple[list[Tensor], Tensor]:
    """x0 and x1 of `Int8`, below each other where the rows are few, and each row's scale: (…, in) → (M, in), (M, 1)."""
    rows = x.reshape(-1, x.shape[-1])  # (M, in)
    scale = rows.abs().amax(-1, keepdim=True).div_(63).clamp_min_(1e-30)  # (M, 1); a row of zeros stays one
    exact = rows / scale
    x0 = exact.round()
    x1 = exact.sub_(x0).mul_(126)  # |x/s − x0| ≤ ½; the operator rounds it
    return [torch.cat([x0, x1])] if len(rows) <= _TOGETHER else [x0, x1], scale


# Up to this number of rows both limbs go through in one call: it is bound by reading the weights.
_TOGETHER = 32


def _once(x: Tensor, name: str, compute: Callable[[Tensor], T]) -> T:
    """compute(x), kept with x itself: the projections that read the same activations share the work on them."""
    found: T | None = getattr(x, name, None)
    if found is None:
        found = compute(x)
        setattr(x, name, found)
    return found


def quantise(weights: Sequence[Weight], columns: Sequence[slice] = (slice(None),)) -> list[tuple[Tensor, Tensor]]:
    """Each row's nearest 8-bit integers, and the size of one step: (out, in) int8 and (out,) float32.

    weights: (out, in) each, taken as one below the other. columns: groups of columns that are quantised by themselves;
    a pair for each. A block of rows is float32 at a time.
    """
    out, width, device = sum(map(len, weights)), weights[0].shape[1], weights[0].device
    found = [
        (torch.empty(out, len(range(width)[part]), dtype=torch.int8, device=device), torch.empty(out, device=device))
        for part in columns
    ]
    step, start = max(1, _BLOCK // width), 0
    for block in (block for weight in weights for block in weight.split(step)):
        rows = block.to(torch.float32)
        for part, (values, scales) in zip(columns, found, strict=True):
            values[start : start + len(rows)], scales[start : start + len(rows)] = _nearest(rows[:, part])
        start += len(rows)
    return found


def _nearest(rows: Tensor) -> tuple[Tensor, Tensor]:
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1)
    scales = (largest / 127).clamp_(min=1e-30)
    return (rows / scales[:, None]).round_(), scales


class Stack:
    """Forms of the pieces of a weight, below each other. A piece may be exchanged at any time for an equal one."""

    def __init__(self, forms: Sequence[Form]):
        self.forms = list(forms)

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.forms) == 1:
            return self.forms[0](x)
        return torch.cat([form(x) for form in self.forms], dim=-1)

    @property
    def nbytes(self) -> int:
        return sum(form.nbytes for form in self.forms)


class Columns:
    """Forms of the columns of a weight, side by side: each multiplies its part of x, and they add up."""

    def __init__(self, forms: Sequence[Form]):
        self._forms = list(forms)
        self.nbytes = sum(form.nbytes for form in forms)

    def __call__(self, x: Tensor) -> Tensor:
        count = len(self._forms)
        parts = _once(x, f"_parts{count}", lambda x: x.tensor_split(count, dim=-1))
        out = self._forms[0](parts[0])
        for form, part in zip(self._forms[1:], parts[1:], strict=True):
            out += form(part)
        return out


class Shared:
    """One product for projections that read the same x: computed for the first that asks, kept for the others.

    The network's text stays `wq(x)`, `wk(x)`, `wv(x)`, and their weights are read in one go.
    """

    def __init__(self, stack: Stack, sizes: Sequence[int]):
        self.stack = stack
        self._sizes = list(sizes)
        self._x: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def take(self, x: Tensor, part: int) -> Tensor:
        """The output of one of the projections."""
        if x is not self._x or part not in self._outputs:
            self._x = x
            self._outputs = dict(enumerate(self.stack(x).split(self._sizes, dim=-1)))
        output = self._outputs.pop(part)
        if not self._outputs:
            self._x = None  # nothing is held longer than it is needed
        return output


class Projection(nn.Module):
    """Stands in the place of an `nn.Linear`."""

    def __init__(self, stack: Stack):
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x)


class SharedProjection(nn.Module):
    """Stands in the place of one of several `nn.Linear`s that read the same x."""

    def __init__(self, shared: Shared, part: int):
        super().__init__()
        self.shared = shared
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.take(x, self.part)


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
    """x·Wᵀ, of which ∂/∂x is g·W. The packed products have no gradient, and torch's own would keep W as float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return Blocks([weight])(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad, weight = grads[0], ctx.weight
        step = max(1, _BLOCK // weight.shape[1])
        blocks = zip(grad.split(step, dim=-1), weight.split(step), strict=True)
        return cast(Tensor, sum(part @ block.to(part.dtype) for part, block in blocks)), None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that the linear layers of a network read for one token."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += module.weight.nbytes
        elif isinstance(module, Projection):
            total += module.stack.nbytes
        elif isinstance(module, SharedProjection) and module.part == 0:
            total += module.shared.stack.nbytes
    return total


class Embedding(nn.Module):
    """Rows of a table as it is stored, given out as `dtype`."""

    def __init__(self, weight: Weight, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False) if isinstance(weight, Tensor) else weight
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        if isinstance(self.weight, Tensor):
            return F.embedding(tokens, self.weight).to(self.dtype)
        distinct, places = tokens.unique(return_inverse=True)
        rows = [self.weight.rows(id, id + 1) for id in distinct.tolist()]
        return torch.cat(rows)[places].to(self.dtype)


def packs() -> bool:
    """Whether this machine has fbgemm's packed products: x86 with AVX2, and torch's quantised engine left as it is."""
    return torch.backends.quantized.engine in ("x86", "fbgemm") and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
