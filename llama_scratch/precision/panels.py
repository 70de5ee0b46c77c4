"""Panels: the memory layout of 8- and 4-bit weights, shared with cpp/panels.h.

A panel interleaves `PANEL` rows: `GROUP` inputs of each row, then the next `GROUP` inputs of each row, and so on.
With this layout, the kernels read a weight sequentially and multiply 16 rows at a time. The scales are a separate
tensor, with one scale per row and block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_scratch.precision import kernels
from llama_scratch.precision.lazy_weight import LazyWeight, Weight
from llama_scratch.precision.quantize import (
    BLOCK_SIZE,
    WEIGHTS_PER_CALIBRATION,
    Hessian,
    dequantize,
    quantize_blocks,
    quantize_panels,
)
from llama_scratch.precision.rows import WEIGHTS_PER_BLOCK, KernelOperand, kernels_product, product, product_type

PANEL = 16
"""Rows per panel. The kernels only run networks whose dimensions are multiples of it."""
GROUP = 4
"""Adjacent inputs of the same row in a panel."""

WEIGHTS_PER_PIECE = 1 << 22
"""Weights to pack at a time, to limit temporary memory."""
PACKING_BYTES = 4 * WEIGHTS_PER_PIECE
"""Temporary memory to pack one piece, per thread."""


class Panels:
    """An 8- or 4-bit weight in panels, multiplied by the kernels or else by torch.

    Args:
        values: Values from `to_panels`.
        scales: Scales from `to_panels`.
        shape: (out, in) of the weight, without padding.
    """

    def __init__(self, values: Tensor, scales: Tensor, shape: tuple[int, int]):
        self.values = values
        self.scales = scales
        self.shape = shape
        self.nbytes = values.nbytes + scales.nbytes
        bits = 8 if values.dtype == torch.int8 else 4
        self.kernel_operands: list[KernelOperand] = [((values, scales), f"int{bits}")]
        # Whether the weight has no padding. `layers` in kernels.cpp requires this.
        self.whole = panel_shapes(shape, bits)[0][0] * PANEL == shape[0] and shape[1] % BLOCK_SIZE[bits] == 0
        self._padding = -shape[1] % BLOCK_SIZE[bits]

    def __call__(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, self._padding)) if self._padding else x
        if kernels.ready() and x.device.type == "cpu":
            out = kernels_product(padded, self.kernel_operands)
        else:
            rows = padded.reshape(-1, padded.shape[-1]).to(product_type(x))  # (M, in)
            step = max(1, WEIGHTS_PER_BLOCK // rows.shape[1] // PANEL)
            pieces = zip(self.values.split(step), self.scales.split(step), strict=True)
            out = torch.cat([product(rows, from_panels(*piece).to(rows.dtype)) for piece in pieces], dim=-1).to(x.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])[..., : self.shape[0]]


def panel_shapes(shape: tuple[int, int], bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of values and scales in panels, see cpp/panels.h.

    Args:
        shape: (out, in) of the weight, which is padded to whole panels and blocks.
        bits: 8 or 4.
    """
    panels, blocks = -(-shape[0] // PANEL), -(-shape[1] // BLOCK_SIZE[bits])
    return (panels, blocks * BLOCK_SIZE[bits] * bits // (8 * GROUP), PANEL, GROUP), (panels, blocks, PANEL)


def panel_bytes(shape: tuple[int, int], bits: int) -> int:
    """Return the size of a weight in panels in bytes, including scales.

    Args:
        shape: (out, in) of the weight.
        bits: 8 or 4.
    """
    values, scales = panel_shapes(shape, bits)
    return math.prod(values) + 2 * math.prod(scales)


def to_panels(
    weights: Sequence[Weight],
    bits: int,
    hessian: Hessian | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Quantize weights into panels.

    Args:
        weights: Weights, (out, in) each. They are stacked along the rows.
        bits: 8 or 4.
        hessian: Hessian of the inputs, padded to whole blocks, for calibration.
        before_each: Called before each piece of rows. It can raise an error to cancel the work.

    Returns:
        Values and scales, with the shapes of `panel_shapes`.

    Raises:
        ValueError: As for `quantize_blocks`.
    """
    padded = _PaddedWeight(weights, bits)
    numbers, steps = panel_shapes(padded.shape, bits)
    values = torch.empty(numbers, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(steps, dtype=torch.float16)
    panels = max(1, (WEIGHTS_PER_CALIBRATION if hessian else WEIGHTS_PER_PIECE) // padded.shape[1] // PANEL)
    for i, part in enumerate(padded.split(panels * PANEL)):
        before_each()
        piece = slice(i * panels, (i + 1) * panels)
        if hessian is None and kernels.ready() and weights[0].device.type == "cpu":
            values[piece], scales[piece] = quantize_panels(part, bits)
        else:
            values[piece], scales[piece] = panels_of(*quantize_blocks(part, bits, hessian))
    return values, scales


def panels_of(numbers: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Reorder the result of `quantize_blocks` into panels.

    Args:
        numbers: The quantized weights, (out, in).
        scales: The scales, (out, in/block).
    """
    missing = -len(numbers) % PANEL
    numbers, scales = F.pad(numbers, (0, 0, 0, missing)), F.pad(scales, (0, 0, 0, missing))
    groups = numbers.view(-1, PANEL, numbers.shape[1] // GROUP, GROUP).transpose(1, 2)
    if numbers.dtype == torch.uint8:
        groups = groups[:, 0::2] | groups[:, 1::2] << 4
    return groups.contiguous(), scales.view(-1, PANEL, scales.shape[1]).transpose(1, 2).contiguous()


def from_panels(values: Tensor, scales: Tensor) -> Tensor:
    """Dequantize panels: (panels · 16, in) float32.

    Args:
        values: Values from `to_panels`.
        scales: Scales from `to_panels`.
    """
    if values.dtype == torch.uint8:
        values = torch.stack([values & 15, values >> 4], dim=2).flatten(1, 2)
    return dequantize(values.transpose(1, 2).flatten(2).flatten(0, 1), scales.transpose(1, 2).flatten(0, 1))


class _PaddedWeight(LazyWeight):
    """Weights stacked along the rows, whose rows are padded with zeros to whole blocks."""

    def __init__(self, weights: Sequence[Weight], bits: int):
        out, width = sum(map(len, weights)), weights[0].shape[1]
        self._missing = -width % BLOCK_SIZE[bits]
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
