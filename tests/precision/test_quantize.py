"""Quantization to 8 and 4 bits: exact on the grid, optimal by its own measure, and defined at the limits."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llama_scratch.precision import quantize
from llama_scratch.precision.lazy_weight import LazyWeight
from llama_scratch.precision.quantize import BLOCK_SIZE, Hessian, dequantize, quantize_blocks

RANGE = {8: (-127, 127), 4: (0, 15)}
BITS = pytest.mark.parametrize("bits", [8, 4])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(width: int, tokens: int = 4000) -> Tensor:
    """Correlated vectors with one feature 30 times as large as the others, as in Llama models: (tokens, width)."""
    x = random(tokens, width // 4, seed=1) @ random(width // 4, width, seed=2) + random(tokens, width, seed=3)
    x[:, 5] *= 30
    return x


def products(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def nearest(weight: Tensor, bits: int) -> Tensor:
    """Plain round-to-nearest with the scale of the largest weight: (out, in)."""
    made = []
    for row in weight.view(-1, BLOCK_SIZE[bits]):
        largest = row[row.abs().argmax()]
        scale = (largest / (127 if bits == 8 else -8)).half().float()
        made.append((row / scale).round().clamp(*((-127, 127) if bits == 8 else (-8, 7))) * scale)
    return torch.stack(made).view_as(weight)


def missed(weight: Tensor, numbers: Tensor, scales: Tensor) -> float:
    return float((weight - dequantize(numbers, scales)).double().square().sum())


# --- Form -------------------------------------------------------------------------------------


@BITS
def test_types_and_shapes(bits: int) -> None:
    """Integers within their range, and one float16 scale per block. Both ends of the range are used."""
    numbers, scales = quantize_blocks(random(48, 256), bits)
    assert numbers.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert numbers.shape == (48, 256)
    assert scales.dtype == torch.float16
    assert scales.shape == (48, 256 // BLOCK_SIZE[bits])
    assert (int(numbers.min()), int(numbers.max())) == RANGE[bits]
    assert bits == 4 or bool((scales > 0).all())


@BITS
@pytest.mark.parametrize("calibrated", [False, True])
def test_weights_on_a_grid_stay_as_they_are(bits: int, calibrated: bool) -> None:
    """Quantizing dequantized weights is bit-identical, even though scales are searched."""
    low, high = RANGE[bits]
    numbers = torch.randint(low, high + 1, (32, 128), generator=torch.Generator().manual_seed(0))
    numbers[:, :: BLOCK_SIZE[bits]] = 127 if bits == 8 else 0  # the end of the range for the largest weight
    numbers = numbers.to(torch.int8 if bits == 8 else torch.uint8)
    scales = (
        torch.linspace(0.5, 2, 32 * 128 // BLOCK_SIZE[bits]).view(32, -1).half()
        * torch.tensor([1, -1]).repeat(16)[:, None]
    )
    weight = dequantize(numbers, scales)
    found = quantize_blocks(weight, bits, Hessian(products(inputs(128))) if calibrated else None)
    assert torch.equal(dequantize(*found), weight)


@BITS
def test_dequantize(bits: int) -> None:
    """Scale × number, or scale × (number − 8) for 4 bits, with the scale of each block."""
    numbers = torch.arange(16, dtype=torch.uint8 if bits == 4 else torch.int8).repeat(2, 8)  # (2, 128)
    scales = torch.arange(1, 2 * 128 // BLOCK_SIZE[bits] + 1).view(2, -1).half() / 4
    weight = dequantize(numbers, scales)
    assert weight.dtype == torch.float32
    for row, place in [(0, 0), (0, 31), (0, 32), (1, 63), (1, 64), (1, 127)]:
        number = int(numbers[row, place]) - (8 if bits == 4 else 0)
        assert weight[row, place] == float(scales[row, place // BLOCK_SIZE[bits]]) * number


@BITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_quantized_alone_in_any_type(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows give the same result in any batch of rows, for any dtype."""
    weight = random(40, 128).to(dtype)
    numbers, scales = quantize_blocks(weight, bits)
    monkeypatch.setattr(quantize, "_WEIGHTS_PER_SEARCH", 7 * 128)
    some = quantize_blocks(weight[5:23].float(), bits)
    assert torch.equal(some[0], numbers[5:23])
    assert torch.equal(some[1], scales[5:23])


def test_what_is_no_tensor_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a range of rows of a lazy weight is a tensor at a time."""
    weight, asked = random(40, 128), []

    class Rows(LazyWeight):
        def rows(self, start: int, stop: int) -> Tensor:
            asked.append(stop - start)
            return weight[start:stop]

    monkeypatch.setattr(quantize, "_WEIGHTS_PER_SEARCH", 16 * 128)
    found = quantize_blocks(Rows((40, 128), torch.float32, 0), 4)
    assert torch.equal(found[0], quantize_blocks(weight, 4)[0])
    assert asked == [16, 16, 8]


# --- Search -----------------------------------------------------------------------------------


@BITS
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_no_block_is_further_off_than_by_nearest(bits: int, size: float) -> None:
    """For normal and heavy-tailed blocks, and blocks with subnormal float16 scales."""
    for weight in (random(64, 256), random(64, 256) ** 3):
        weight = weight * size
        found = dequantize(*quantize_blocks(weight, bits))
        errors = [
            (weight - made).double().view(-1, BLOCK_SIZE[bits]).norm(dim=1) for made in (found, nearest(weight, bits))
        ]
        assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())


@pytest.mark.parametrize(("bits", "share"), [(8, 0.85), (4, 0.92)])
def test_search_gains(bits: int, share: float) -> None:
    """For normal weights, the squared error is at least 15 % (8 bits) or 8 % (4 bits) below nearest."""
    weight = random(256, 512)
    error = missed(weight, *quantize_blocks(weight, bits))
    assert error < share * float((weight - nearest(weight, bits)).double().square().sum())


@BITS
def test_a_place_that_costs_more_is_hit(bits: int) -> None:
    """The error is small at an index with a high cost."""
    blocks, cost = random(200, BLOCK_SIZE[bits]), torch.ones(BLOCK_SIZE[bits])
    cost[7] = 1000
    scales = quantize._search(blocks, bits, cost)
    missed = (blocks - quantize._round(blocks, quantize._inverse(scales)[:, None], bits) * scales[:, None])[:, 7]
    assert float(missed.abs().quantile(0.9)) < 2**-10  # the resolution of a float16 scale


def test_a_scale_takes_the_sign_of_the_larger_side() -> None:
    """There are eight steps in one direction and seven in the other."""
    weight = torch.linspace(-8, 7, 64).round()[None]
    for sign in (1, -1):
        numbers, scales = quantize_blocks(sign * weight, 4)
        assert scales.item() == sign
        assert torch.equal(dequantize(numbers, scales), sign * weight)


@BITS
def test_zeros(bits: int) -> None:
    """A block of zeros stays zero, with or without other blocks in the row."""
    weight = random(4, 256)
    weight[1] = 0
    weight[2, 64:128] = 0
    for curvature in (None, Hessian(products(inputs(256)))):
        found = dequantize(*quantize_blocks(weight, bits, curvature))
        assert not found[1].any()
    assert not dequantize(*quantize_blocks(weight, bits))[2, 64:128].any()


@BITS
def test_one_outlier(bits: int) -> None:
    """The outlier is accurate to within a step, and affects only its own block."""
    weight = random(4, 256)
    plain = dequantize(*quantize_blocks(weight, bits))
    weight[2, 70] = 5000
    numbers, scales = quantize_blocks(weight, bits)
    found = dequantize(numbers, scales)
    assert abs(found[2, 70] - 5000) <= float(scales[2, 70 // BLOCK_SIZE[bits]].abs()) / 2
    others = torch.ones(4, 256, dtype=torch.bool)
    others[2, 64:128] = False
    assert torch.equal(found[others], plain[others])


@BITS
def test_tiny_weights(bits: int) -> None:
    """Below the smallest float16 scale, the error is at most half that scale times the range."""
    weight = random(8, 128) * 1e-7
    found = dequantize(*quantize_blocks(weight, bits))
    assert bool(found.isfinite().all())
    assert bool((found - weight).abs().max() <= weight.abs().max())
    assert not dequantize(*quantize_blocks(weight * 1e-30, bits)).any()


@BITS
def test_the_largest_weights(bits: int) -> None:
    """Up to the limit of float16 scales, without overflow in between."""
    largest = 65504 * (127 if bits == 8 else 7)
    weight = torch.full((2, 64), float(largest))
    weight[1] *= torch.linspace(-1, 1, 64)
    for curvature in (None, Hessian(products(inputs(64)))):
        numbers, scales = quantize_blocks(weight, bits, curvature)
        assert bool(scales.isfinite().all())
        assert float((dequantize(numbers, scales)[0] / largest - 1).abs().max()) < 0.1
    with pytest.raises(ValueError, match="float16 scales"):
        quantize_blocks(weight * 1.001, bits)


@BITS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(bits: int, value: float) -> None:
    """NaN at any index is rejected, because its rounded value would look like a valid weight."""
    weight = random(40, 128)
    weight[37, 101] = value
    with pytest.raises(ValueError, match="NaN"):
        quantize_blocks(weight, bits)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    """96 inputs are three blocks of 32, but not a whole number of blocks of 64."""
    assert quantize_blocks(random(2, 96), 8)[1].shape == (2, 3)
    with pytest.raises(ValueError, match="rows have 96 weights, expected a multiple of 64"):
        quantize_blocks(random(2, 96), 4)


# --- Calibration ------------------------------------------------------------------------------


def test_the_factor() -> None:
    """R Rᵀ is the damped H over its mean diagonal, with R upper triangular, even if an input was always zero."""
    H = products(inputs(64))
    H[3] = H[:, 3] = 0
    curvature = Hessian(H * 1e-12, damping=0.25)
    R = curvature.factor.double()
    assert torch.equal(R, R.triu())
    expected = H.double() / H.double().diagonal().mean()
    expected += torch.diag(0.25 * expected.diagonal() + 1e-3)
    assert float((R @ R.T - expected).abs().max()) < 1e-5
    assert torch.allclose(curvature.matrix.double(), expected, atol=1e-6)
    assert torch.equal(Hessian(torch.zeros(4, 4)).matrix, 1e-3 * torch.eye(4))


@BITS
def test_calibration_lowers_the_error_of_the_output(bits: int) -> None:
    """‖XWᵀ − XŴᵀ‖ on the examples and on similar ones: GPTQ is better than search, descent better than GPTQ."""
    x, weight = inputs(256), random(96, 256)
    H = products(x[:2000])
    curvature = Hessian(H)
    blocks = weight.view(96, -1, BLOCK_SIZE[bits])
    gptq = quantize._gptq(blocks, curvature, bits)
    gptq_weight = (gptq[0] * gptq[1][..., None]).flatten(1)
    found = [
        dequantize(*quantize_blocks(weight, bits)),
        gptq_weight,
        dequantize(*quantize_blocks(weight, bits, curvature)),
    ]
    for rows in (x[:2000], x[2000:]):
        search, by_gptq, descended = (float((rows @ (weight - made).T).norm()) for made in found)
        assert by_gptq < 0.6 * search
        assert descended < 0.97 * by_gptq


def test_gptq_is_gptq() -> None:
    """The same numbers as the paper's algorithm, with the inverse of H and weights updated in place."""
    weight, curvature = random(16, 128), Hessian(products(inputs(128)))
    numbers, scales = quantize._gptq(weight.view(16, 2, 64), curvature, 4)
    inverse = torch.linalg.cholesky(torch.linalg.inv(curvature.matrix.double()), upper=True)
    left, expected = weight.double(), torch.empty(16, 128, dtype=torch.float64)
    for j in range(128):
        if j % 64 == 0:  # the scale depends on the weights as updated so far
            cost = 1 / inverse.diagonal()[j : j + 64].float()
            assert torch.allclose(
                scales[:, j // 64], quantize._search(left[:, j : j + 64].float(), 4, cost), rtol=2**-10
            )
        scale = scales[:, j // 64].double()
        expected[:, j] = (left[:, j] / scale).round().clamp(-8, 7)
        error = (left[:, j] - expected[:, j] * scale) / inverse[j, j]
        left = left - error[:, None] * inverse[j] * (torch.arange(128) >= j)
    assert float((numbers.flatten(1) == expected).double().mean()) > 0.999


def test_the_descent_goes_straight_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step finds the optimal scale or number, compared with brute force."""
    weight, curvature = random(8, 128).double(), Hessian(products(inputs(128)))
    H = curvature.matrix.double()
    numbers, scales = torch.zeros(8, 2, 64), torch.full((8, 2), 0.4).half().float()
    numbers[:, :, ::3] = 2

    def cost(numbers: Tensor, scales: Tensor) -> Tensor:
        e = weight - (numbers.double() * scales.double()[..., None]).flatten(1)
        return ((e @ H) * e).sum(1)

    monkeypatch.setattr(quantize, "_SWEEPS", 1)
    blocks = weight.float().view(8, 2, 64)
    found = quantize._descend(blocks, numbers.clone(), scales.clone(), curvature, 4)
    for b in range(2):
        unit = torch.zeros_like(scales)
        unit[:, b] = 1
        # The minimum of a parabola through three scales.
        low, middle, high = (cost(numbers, scales + move * unit) for move in (-1, 0, 1))
        scales[:, b] += ((low - high) / (2 * (low + high - 2 * middle))).float()
        scales = scales.half().float()
        for j in range(64):
            tried = []
            for number in range(-8, 8):
                numbers[:, b, j] = number
                tried.append(cost(numbers, scales))
            numbers[:, b, j] = torch.stack(tried).argmin(0) - 8.0
    assert torch.allclose(found[1], scales, rtol=2**-10)
    assert float((found[0] == numbers).float().mean()) > 0.99


def test_no_sweep_of_the_descent_is_one_upwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost never increases, and falls far from a bad start."""
    weight, curvature = random(24, 128), Hessian(products(inputs(128)))
    H = curvature.matrix.double()
    numbers, scales = torch.zeros(24, 2, 64), torch.full((24, 2), 0.4).half().float()
    costs = []
    monkeypatch.setattr(quantize, "_SWEEPS", 1)
    for _ in range(20):
        e = weight.double() - (numbers.double() * scales.double()[..., None]).flatten(1)
        costs.append(((e @ H) * e).sum(1))
        numbers, scales = quantize._descend(weight.view(24, 2, 64), numbers, scales, curvature, 4)
    for before, after in pairwise(costs):
        assert bool((after <= before * 1.001).all())
    assert float(costs[-1].sum()) < 0.01 * float(costs[0].sum())


@BITS
def test_the_same_weights_give_the_same_bits(bits: int) -> None:
    """Whatever was computed in between, with any number of threads."""
    weight, H = random(64, 256), products(inputs(256))
    threads = torch.get_num_threads()
    found = []
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        found.append(quantize_blocks(weight, bits))
        random(300, 300)
    torch.set_num_threads(threads)
    again = [quantize_blocks(weight, bits, Hessian(H)) for _ in range(2)]
    for numbers, scales in found[1:]:
        assert torch.equal(numbers, found[0][0])
        assert torch.equal(scales, found[0][1])
    assert torch.equal(again[0][0], again[1][0])
    assert torch.equal(again[0][1], again[1][1])
