"""Quantize weights to 8 or 4 bits with the least effect on a layer's output.

Each row of a weight (out, in) is split into blocks. A block consists of small integers and one float16 scale:

    bits   numbers      block size   weight                 bits per weight
    8      −127 … 127   32           scale · number         8.5
    4      0 … 15       64           scale · (number − 8)   4.25

With 4 bits, a scale can be negative. The range −8 … 7 is asymmetric: a negative scale puts −8 on the side of the
positive weights, which helps if the block's largest weight is positive.

There are three methods, in order of increasing accuracy:

    nearest      the largest weight of a block determines its scale, and each weight is rounded to the nearest step
    search       the scale with the least Σ(w − ŵ)² out of many candidates: the best choice if the inputs are unknown
    calibrated   minimizes the error of the output for examples of the inputs x. If ŵ replaces a row w, the output
                 changes by (w − ŵ)·x. With H = E[x xᵀ], the mean square of this change is

                     E[((w − ŵ)·x)²] = (w − ŵ) H (w − ŵ)ᵀ

                 Because inputs are correlated, one weight can compensate for the error of another. `_gptq` and
                 `_descend` make use of this.

Sources: Frantar et al. 2022, arXiv:2210.17323 (GPTQ); Chee et al. 2023, arXiv:2307.13304 (the same without an inverse);
Behdin et al. 2023, arXiv:2309.01885 (descent); `make_qx_quants` in ggml-org/llama.cpp (search, negative scales).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from llama_scratch.precision.lazy_weight import Weight

BLOCK_SIZE = {8: 32, 4: 64}
"""Bits → inputs per scale (the group size)."""

_GRID = {8: (-127, 127), 4: (-8, 7)}
# Candidate scales of a block, each as the quotient of the block's largest weight and the scale. The first one is
# `nearest`. A smaller absolute value is a coarser scale, which clips fewer weights. A larger one is finer, but clips
# more.
# With 8 bits, little is clipped, but some scales fit a block's weights better than others.
_STEPS = {
    8: [127.0, *torch.linspace(127.4, 122, 15).tolist()],
    4: [-8.0, *torch.linspace(-9, -6, 15).tolist(), *torch.linspace(5.6, 7.9, 16).tolist()],
}
_MAX_FLOAT16 = torch.finfo(torch.float16).max
_UNSEEN_INPUT_WEIGHT = 1e-3  # added to the diagonal of H, relative to its mean: inputs that were always zero still cost
_SWEEPS = 2  # of the descent; more sweeps gain less than 1 %
_WEIGHTS_PER_SEARCH = 1 << 19  # fits into the CPU's cache
WEIGHTS_PER_CALIBRATION = 1 << 24
"""Weights to calibrate at a time. Many rows, because the overhead per input is large."""


class Hessian:
    """Damped H = E[x xᵀ] for a layer's inputs, with its Cholesky factor.

    Computed in float64. Layers with the same input share one.

    Args:
        products: H, (in, in), up to a constant factor.
        damping: Relative increase of the diagonal, as if noise were added to the inputs. It is needed because, with few
            examples, correlations are estimated less reliably than variances. GPTQ adds a fraction of the mean diagonal
            instead, but
            in Llama models a few very large inputs dominate the mean. With GPTQ's damping, SmolLM2's divergence from
            float32 was twice as large.
    """

    def __init__(self, products: Tensor, damping: float = 0.5):
        damped = products.double()
        damped /= products.diagonal().mean().clamp_min(1e-30)
        damped.diagonal().mul_(1 + damping).add_(_UNSEEN_INPUT_WEIGHT)
        self.matrix = damped.float()  # H
        # Upper triangular R with R Rᵀ = H: flip H, take the lower Cholesky factor, flip back.
        damped = damped.flip(0, 1)
        self.factor = torch.linalg.cholesky(damped).float().flip(0, 1)


def quantize_blocks(weight: Weight, bits: int, hessian: Hessian | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a weight to 8 or 4 bits, by search or with calibration.

    Converts only a range of rows to float32 at a time.

    Args:
        weight: The weight, (out, in).
        bits: 8 or 4.
        hessian: Hessian of the weight's inputs, (in, in), for calibration.

    Returns:
        The numbers, (out, in) int8 for 8 bits and uint8 for 4 bits, and the scales, (out, in/block) float16.

    Raises:
        ValueError: If a row is not a whole number of blocks, or a weight is NaN or too large for a float16 scale.
    """
    (out, width), block, largest = weight.shape, BLOCK_SIZE[bits], _MAX_FLOAT16 * _GRID[bits][1]
    _check_width(width, bits)
    numbers = torch.empty(out, width // block, block, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(out, width // block, dtype=torch.float16)
    start = 0
    for part in weight.split(max(1, (WEIGHTS_PER_CALIBRATION if hessian else _WEIGHTS_PER_SEARCH) // width)):
        rows = part.to(torch.float32)  # (rows, in)
        if not torch.linalg.vector_norm(rows, torch.inf) <= largest:  # also false for NaN
            raise _too_large(bits)
        blocks = rows.view(len(rows), -1, block)
        if hessian is None:
            steps = _search(blocks, bits)
            rounded = _round(blocks, _inverse(steps)[..., None], bits)
        else:
            rounded, steps = _descend(blocks, *_gptq(blocks, hessian, bits), hessian, bits)
        numbers[start : start + len(rows)] = rounded if bits == 8 else rounded.add_(8)
        scales[start : start + len(rows)] = steps
        start += len(rows)
    return numbers.flatten(1), scales


def quantize_panels(weight: Weight, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight with the kernels' search, directly into panels.

    Converts the whole weight to float32 at once. The kernels must be loaded.

    Args:
        weight: The weight, (out, in), on a CPU.
        bits: 8 or 4.

    Returns:
        Values and scales in the layout of cpp/panels.h, zero-padded to whole panels.

    Raises:
        ValueError: As for `quantize_blocks`.
    """
    _check_width(weight.shape[1], bits)
    rows = weight.to(torch.float32).contiguous()
    values, scales, fits = torch.ops.llama_scratch.quantize(rows, _STEPS[bits], bits)
    if not fits:
        raise _too_large(bits)
    return cast(Tensor, values), cast(Tensor, scales)


def _check_width(width: int, bits: int) -> None:
    if width % BLOCK_SIZE[bits]:
        raise ValueError(f"rows have {width} weights, expected a multiple of {BLOCK_SIZE[bits]}")


def _too_large(bits: int) -> ValueError:
    largest = _MAX_FLOAT16 * _GRID[bits][1]
    return ValueError(f"a weight is NaN or beyond ±{largest:,.0f}, the range of float16 scales")


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """Dequantize the result of `quantize_blocks`: (out, in) float32.

    Args:
        numbers: The quantized weights, (out, in).
        scales: The scales, (out, in/block).
    """
    steps = numbers.float() - (8 if numbers.dtype == torch.uint8 else 0)
    return (steps.view(*scales.shape, -1) * scales.float()[..., None]).flatten(1)


# --- Search -----------------------------------------------------------------------------------


def _inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, or 0 for a scale of 0, so that all weights of such a block become 0."""
    return torch.where(scale == 0, 0, 1 / scale)


def _round(x: Tensor, inverse: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Round x · inverse to the numbers of the grid. out: tensor for the result."""
    return torch.mul(x, inverse, out=out).round_().clamp_(*_GRID[bits])


def _as_scale(x: Tensor) -> Tensor:
    """Round to float16 precision. The result is float32."""
    return x.clamp(-_MAX_FLOAT16, _MAX_FLOAT16).half().float()


def _search(blocks: Tensor, bits: int, cost: Tensor | float = 1.0) -> Tensor:
    """Find the scales with the least Σ(c · (w − ŵ))², (…, block) → (…).

    For c = 1, the kernels do the same faster, see cpp/search.h.

    Args:
        blocks: Weights w, (…, block).
        bits: 8 or 4.
        cost: Cost c of an error at each index, (block,).
    """
    maximum, minimum = blocks.amax(-1), blocks.amin(-1)
    largest = torch.where(maximum > -minimum, maximum, -minimum if bits == 8 else minimum)
    best, error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    space = torch.empty_like(blocks)  # reused: allocating memory would take longer than the sums
    for steps in (*_STEPS[bits], None):
        if steps is not None:
            scale = largest / steps
        else:  # last, the least-squares scale for the best candidate's numbers n: Σ c² n w / Σ c² n²
            numbers = _round(blocks, _inverse(best)[..., None], bits, out=space).mul_(cost)
            scale = (numbers * blocks * cost).sum(-1) / numbers.square().sum(-1)  # NaN for zeros, which is never less
        scale = _as_scale(scale)
        numbers = _round(blocks, _inverse(scale)[..., None], bits, out=space)
        missed = torch.addcmul(blocks, numbers, scale[..., None], value=-1, out=space).mul_(cost)
        new_error = torch.linalg.vector_norm(missed, dim=-1)
        best = torch.where(new_error < error, scale, best)
        error = torch.minimum(new_error, error)
    return best


# --- Calibration ------------------------------------------------------------------------------


def _gptq(blocks: Tensor, hessian: Hessian, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize the weights of one input (a column) after another. Each number compensates for the errors of the
    previous ones in its row.

    With R Rᵀ = H and e = w − ŵ, the cost e H eᵀ is ‖eR‖². R is zero below its diagonal, so

        (eR)_j = R_jj · (e_j + Σ_{i<j} e_i R_ij / R_jj)

    depends only on the errors up to j. Given the errors before j, the best number for j is the one nearest to
    w_j + Σ_{i<j} e_i R_ij / R_jj. The scale of a block is searched for the weights that would compensate exactly.

    Returns:
        Numbers, (rows, in/block, block), and scales, (rows, in/block).
    """
    R, block = hessian.factor, blocks.shape[-1]
    numbers, scales = torch.empty_like(blocks), blocks.new_empty(blocks.shape[:2])
    errors = torch.empty_like(blocks).flatten(1)  # e
    for b in range(blocks.shape[1]):
        start, end = b * block, (b + 1) * block
        block_R = R[start:end, start:end]
        carried = errors[:, :start] @ R[:start, start:end]  # Σ e_i R_ij over the previous blocks, (rows, block)
        ideal = blocks[:, b] + torch.linalg.solve_triangular(block_R, carried, upper=True, left=False)
        scales[:, b] = scale = _search(ideal, bits, block_R.diagonal())
        # Transposed, (block, rows), because the loop reads one input of all rows at a time.
        carried, weights = carried.T.contiguous(), blocks[:, b].T.contiguous()
        taken, error, inverse = torch.empty_like(carried), torch.empty_like(carried), _inverse(scale)
        for j, R_jj in enumerate(block_R.diagonal().tolist()):
            taken[j] = _round(weights[j] + carried[j] / R_jj, inverse, bits)
            error[j] = weights[j] - taken[j] * scale
            carried[j + 1 :].addr_(block_R[j, j + 1 :], error[j])
        numbers[:, b], errors[:, start:end] = taken.T, error.T
    return numbers, scales


def _descend(blocks: Tensor, numbers: Tensor, scales: Tensor, hessian: Hessian, bits: int) -> tuple[Tensor, Tensor]:
    """Improve numbers and scales by coordinate descent, in `_SWEEPS` sweeps.

    Each step optimizes one number or scale while all others are fixed.

    The cost is e H eᵀ, and g = e H is half its gradient. The best weight is ŵ_j + g_j / H_jj, and the best scale of a
    block with numbers n is s + g·n / n H nᵀ. No step increases the cost, except by rounding a scale to float16.
    """
    H, block = hessian.matrix, blocks.shape[-1]
    errors = blocks - numbers * scales[..., None]  # e
    for b in list(range(blocks.shape[1])) * _SWEEPS:
        inputs = slice(b * block, (b + 1) * block)
        block_H, taken, scale = H[inputs, inputs], numbers[:, b], scales[:, b]
        slope = errors.flatten(1) @ H[inputs].T  # g, because H is symmetric
        bend = ((taken @ block_H) * taken).sum(1)  # n H nᵀ
        better = _as_scale(scale + (slope * taken).sum(1) / bend.clamp_min(1e-30))
        slope -= (taken * (better - scale)[:, None]) @ block_H
        slope, taken, inverse = slope.T.contiguous(), taken.T.contiguous(), _inverse(better)  # (block, rows), as above
        for j, H_jj in enumerate(block_H.diagonal().tolist()):
            moved = _round(taken[j] * better + slope[j] / H_jj, inverse, bits)
            slope.addr_(block_H[j], (taken[j] - moved) * better)
            taken[j] = moved
        numbers[:, b], scales[:, b] = taken.T, better
        errors[:, b] = blocks[:, b] - taken.T * better[:, None]
    return numbers, scales
