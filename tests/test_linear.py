"""Each form of a linear layer against a product in float64, and the one product that three projections share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from llama_scratch import linear
from llama_scratch.lazy import as_tensor
from llama_scratch.linear import (
    Blocks,
    Columns,
    Differentiable,
    Embedding,
    Form,
    Half,
    Int8,
    Projection,
    Shared,
    SharedProjection,
    Stack,
    packs,
    quantise,
    weight_bytes,
)

needs_fbgemm = pytest.mark.skipif(not packs(), reason="this machine has no fbgemm (x86 with AVX2)")

# (out, in): a usual one, and others that are no multiple of 8, 16 or 64.
SHAPES = [(96, 64), (1, 1), (7, 13), (33, 65), (130, 200), (17, 8), (256, 2048)]
ROWS = [1, 3, 33, 200]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(rows: int, columns: int, *, outlier: bool = False) -> Tensor:
    """Random rows, one of them zeros where there are several; with an outlier one column is 1000 times as large."""
    x = random(rows, columns, seed=1)
    if rows > 1:
        x[1] = 0
    if outlier:
        x[:, columns // 2] *= 1000
    return x


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x·Wᵀ in float64."""
    return x.double() @ weight.double().T


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def step_by_row(values: Tensor, scales: Tensor) -> Tensor:
    """The weights that 8-bit values and their scales stand for."""
    return values.double() * scales.double()[:, None]


def one_scale(x: Tensor, weight: Tensor) -> Tensor:
    """What 8 bits and one scale for all activations give: what torch's dynamic quantisation does."""
    scale = x.abs().max() / 127
    return product((x / scale).round() * scale, weight)


# --- The forms --------------------------------------------------------------------------------


def blocks(weight: Tensor) -> tuple[Form, Tensor]:
    return Blocks([weight]), weight


def blocks_bf16(weight: Tensor) -> tuple[Form, Tensor]:
    return Blocks([weight.bfloat16()]), weight.bfloat16()


def blocks_fp16(weight: Tensor) -> tuple[Form, Tensor]:
    return Blocks([weight.half()]), weight.half()


def blocks_int8(weight: Tensor) -> tuple[Form, Tensor]:
    values, scales = quantise([weight])[0]
    return Blocks([values], [scales]), step_by_row(values, scales)


def half(weight: Tensor) -> tuple[Form, Tensor]:
    return Half(weight), weight.half()


def half_of_bf16(weight: Tensor) -> tuple[Form, Tensor]:
    return Half(weight.bfloat16()), weight.bfloat16()


def int8(weight: Tensor) -> tuple[Form, Tensor]:
    values, scales = quantise([weight])[0]
    return Int8(values, scales), step_by_row(values, scales)


Make = Callable[[Tensor], tuple[Form, Tensor]]
EXACT: list[object] = [
    blocks,
    blocks_bf16,
    blocks_fp16,
    blocks_int8,
    pytest.param(half, marks=needs_fbgemm),
    pytest.param(half_of_bf16, marks=needs_fbgemm),
]


@pytest.mark.parametrize("outlier", [False, True], ids=["plain", "outlier"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", EXACT)
def test_a_form_gives_the_product_with_the_weights_that_it_holds(
    make: Make, shape: tuple[int, int], outlier: bool
) -> None:
    """Nothing is lost but float32's rounding, for any number of rows."""
    form, held = make(random(*shape) / shape[1] ** 0.5)
    for rows in ROWS:
        x = activations(rows, shape[1], outlier=outlier)
        out = form(x)
        assert out.shape == (rows, shape[0])
        assert out.dtype == torch.float32
        assert relative(out, product(x, held)) <= 5e-6
        assert not out[1:2].any()  # the row of zeros


@needs_fbgemm
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_keeps_what_stands_beside_an_outlier(shape: tuple[int, int]) -> None:
    """13 bits for an activation: within 5e-4, and 2e-3 where one column is 1000 times as large as the others."""
    form, held = int8(random(*shape) / shape[1] ** 0.5)
    for rows in ROWS:
        for outlier, bound in ((False, 5e-4), (True, 2e-3)):
            x = activations(rows, shape[1], outlier=outlier)
            out = form(x)
            assert out.dtype == torch.float32
            assert relative(out, product(x, held)) <= bound
            assert not out[1:2].any()


@pytest.mark.parametrize("shape", [(130, 200), (256, 2048)], ids=str)
def test_one_scale_of_8_bits_would_fail_the_bound_of_int8(shape: tuple[int, int]) -> None:
    """By far: the bound above does tell the two apart."""
    weight = random(*shape)
    for outlier, bound in ((False, 5e-4), (True, 2e-3)):
        x = activations(33, shape[1], outlier=outlier)
        assert relative(one_scale(x, weight), product(x, weight)) > 5 * bound


@needs_fbgemm
@pytest.mark.parametrize("rows", [16, 200])
def test_int8_is_exact_in_steps_of_13_bits(rows: int) -> None:
    """Activations that are whole numbers of 1/(63 · 126) of the largest lose nothing, in one call or two."""
    steps = torch.randint(-63 * 126, 63 * 126 + 1, (rows, 65), generator=torch.Generator().manual_seed(0))
    steps[:, 0] = 63 * 126
    x = steps / 126
    values, scales = quantise([random(33, 65)])[0]
    assert relative(Int8(values, scales)(x), product(x, step_by_row(values, scales))) <= 1e-6


@needs_fbgemm
def test_int8_sums_do_not_saturate() -> None:
    """The largest values of one sign everywhere: 16-bit sums of two 8-bit products would overflow."""
    values, scales = torch.full((16, 4096), 127, dtype=torch.int8), torch.ones(16)
    for sign in (1.0, -1.0):
        x = torch.full((2, 4096), sign)
        assert relative(Int8(values, scales)(x), product(x, values)) <= 1e-6


@pytest.mark.parametrize("make", [*EXACT, pytest.param(int8, marks=needs_fbgemm)])
@pytest.mark.parametrize("leading", [(1,), (2, 3), (1, 2, 5)], ids=str)
def test_leading_dimensions_stay(make: Make, leading: tuple[int, ...]) -> None:
    """(…, in) → (…, out), each row as if it were alone."""
    form, _ = make(random(33, 65))
    x = random(*leading, 65, seed=1)
    out = form(x)
    assert out.shape == (*leading, 33)
    assert torch.allclose(out.reshape(-1, 33), form(x.reshape(-1, 65)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("make", [*EXACT, pytest.param(int8, marks=needs_fbgemm)])
def test_the_activations_are_left_alone(make: Make) -> None:
    """Other projections read the same x."""
    form, _ = make(random(33, 65))
    x = random(3, 65, seed=1)
    before = x.clone()
    form(x)
    assert torch.equal(x, before)


def test_blocks_of_several_weights_stand_below_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the type, with scales or without, and however small the blocks."""
    weights = [random(rows, 65, seed=rows) for rows in (40, 7, 1)]
    x = activations(3, 65)
    for block in (1, 65 * 3, 1 << 19):
        monkeypatch.setattr(linear, "_BLOCK", block)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            held = [weight.to(dtype) for weight in weights]
            assert relative(Blocks(held)(x), product(x, torch.cat(held))) <= 5e-6
        values, scales = zip(*(quantise([weight])[0] for weight in weights), strict=True)
        assert relative(Blocks(values, scales)(x), product(x, step_by_row(torch.cat(values), torch.cat(scales)))) < 5e-6


@pytest.mark.parametrize("scaled", [False, True])
def test_blocks_multiply_in_the_type_of_the_activations(scaled: bool) -> None:
    """bfloat16 in, bfloat16 out, as on a GPU."""
    weight = random(33, 65).bfloat16()
    values, scales = quantise([weight])[0]
    form = Blocks([values], [scales]) if scaled else Blocks([weight])
    x = random(3, 65, seed=1).bfloat16()
    out = form(x)
    assert out.dtype == torch.bfloat16
    assert relative(out, product(x, step_by_row(values, scales) if scaled else weight)) <= 1e-2


def test_blocks_hold_the_given_tensors() -> None:
    """Mapped weights are not copied."""
    weights = [random(4, 8), random(3, 8)]
    assert [as_tensor(held).data_ptr() for held in Blocks(weights).weights] == [weight.data_ptr() for weight in weights]


# --- float16 ----------------------------------------------------------------------------------


@needs_fbgemm
def test_half_is_exact_for_bfloat16_down_to_2_to_the_minus_17() -> None:
    """Every bfloat16 number from there to float16's largest, of both signs, comes out as it went in."""
    numbers = torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16)
    kept = numbers[(numbers.float() >= 2**-17) & (numbers.float() <= 65504)]
    assert len(kept) > 4000
    weight = torch.cat([kept, -kept])[:, None]
    assert torch.equal(Half(weight)(torch.ones(1, 1))[0], weight[:, 0].float())


@needs_fbgemm
def test_half_rounds_what_is_smaller() -> None:
    """By at most half of float16's smallest step, 2⁻²⁴, as torch's own conversion does."""
    numbers = torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16)
    small = numbers[numbers.float() < 2**-17][:, None]
    out = Half(small)(torch.ones(1, 1))[0]
    assert (out - small[:, 0].float()).abs().max() <= 2**-25
    assert torch.equal(out, small[:, 0].half().float())


# --- 8 bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantised_weights_are_off_by_half_a_step_at_most(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Row by row, with a scale of the row's own; the largest of a row is ±127, and blocks of any size agree."""
    weight = (random(50, 65) * torch.logspace(-4, 3, 50)[:, None]).to(dtype)
    values, scales = quantise([weight])[0]
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert (values.shape, scales.shape) == ((50, 65), (50,))
    error = (step_by_row(values, scales) - weight.double()).abs()
    assert (error <= 0.5001 * scales[:, None]).all()
    assert values.abs().amax(1).eq(127).all()
    monkeypatch.setattr(linear, "_BLOCK", 65 * 3)
    assert all(torch.equal(a, b) for a, b in zip(quantise([weight])[0], (values, scales), strict=True))


@pytest.mark.parametrize("packed", [pytest.param(True, marks=needs_fbgemm), False])
def test_a_row_of_zeros_stays_one(packed: bool) -> None:
    """Its scale is no zero, by which nothing could be divided."""
    weight = random(5, 64)
    weight[2] = 0
    values, scales = quantise([weight])[0]
    assert not values[2].any()
    assert scales.min() > 0
    out = (Int8(values, scales) if packed else Blocks([values], [scales]))(random(3, 64))
    assert not out[:, 2].any()
    assert out.isfinite().all()


@needs_fbgemm
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_hides_no_damage(value: float) -> None:
    """An activation that is no number makes all of its row none, and no other row."""
    values, scales = quantise([random(5, 64)])[0]
    x = random(3, 64)
    x[1, 7] = value
    assert Int8(values, scales)(x).isfinite().all(1).tolist() == [True, False, True]


# --- Stack and Shared -------------------------------------------------------------------------


def test_a_stack_is_its_forms_below_each_other_and_any_may_be_exchanged() -> None:
    """As pieces are packed one by one while the network answers."""
    weights = [random(rows, 64, seed=rows) for rows in (5, 1, 9)]
    stack = Stack([Blocks([weight]) for weight in weights])
    x = activations(3, 64)
    whole = product(x, torch.cat(weights))
    assert relative(stack(x), whole) <= 1e-6
    stack.forms[1] = Blocks([weights[1].bfloat16()])
    assert 1e-6 < relative(stack(x), whole) <= 1e-2


class Counted:
    """A form that counts how often it is asked."""

    def __init__(self, weight: Tensor):
        self.form = Blocks([weight])
        self.nbytes = self.form.nbytes
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.form(x)


SIZES = (6, 2, 3)


def shared_parts() -> tuple[Counted, Shared, Sequence[SharedProjection], Sequence[Tensor]]:
    weights = [random(rows, 64, seed=rows) for rows in SIZES]
    counted = Counted(torch.cat(weights))
    shared = Shared(Stack([counted]), SIZES)
    return counted, shared, [SharedProjection(shared, part) for part in range(3)], weights


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_three_projections_of_one_x_are_computed_once(order: tuple[int, ...]) -> None:
    """In whatever order they are asked; again for another x; and nothing is held afterwards."""
    counted, shared, parts, weights = shared_parts()
    for call, x in enumerate([random(2, 64), random(2, 64, seed=5), random(7, 64)], start=1):
        for part in order:
            assert relative(parts[part](x), product(x, weights[part])) <= 1e-6
        assert counted.calls == call
        assert shared._x is None
        assert not shared._outputs


def test_the_same_x_again_is_computed_again() -> None:
    """Nothing was kept of the first time, and the weights may have become others."""
    counted, _, parts, _ = shared_parts()
    x = random(2, 64)
    for _ in range(2):
        for part in parts:
            part(x)
    assert counted.calls == 2


def test_a_projection_that_asks_twice_gets_an_answer() -> None:
    """What was taken is computed again rather than missing."""
    _, _, parts, weights = shared_parts()
    x = random(2, 64)
    for part in (0, 0, 1, 2, 1):
        assert relative(parts[part](x), product(x, weights[part])) <= 1e-6


def test_what_an_interruption_left_behind_answers_no_other_x() -> None:
    """The first projection of one x, then all three of another, as after Ctrl-C between wq and wk."""
    counted, shared, parts, weights = shared_parts()
    parts[0](random(2, 64))
    x = random(2, 64, seed=5)
    for part in (0, 1, 2):
        assert relative(parts[part](x), product(x, weights[part])) <= 1e-6
    assert counted.calls == 2
    assert shared._x is None


# --- Bytes and the embedding ------------------------------------------------------------------


def test_weight_bytes_counts_each_weight_once() -> None:
    """Torch's own layers, stacks, and three projections that share one."""
    _, _, parts, _ = shared_parts()
    model = nn.ModuleList([nn.Linear(8, 4, bias=False), Projection(Stack([Blocks([random(3, 8).half()])])), *parts])
    assert weight_bytes(model) == 4 * 8 * 4 + 2 * 3 * 8 + 4 * sum(SIZES) * 64


@needs_fbgemm
def test_packed_forms_know_their_size() -> None:
    """2 bytes a weight, and 1 with 4 for each row."""
    weight = random(33, 65)
    assert half(weight)[0].nbytes == 2 * 33 * 65
    assert int8(weight)[0].nbytes == 33 * 65 + 4 * 33


def test_an_embedding_gives_rows_of_the_table_as_another_type() -> None:
    """And does not copy the table."""
    table = random(10, 4).bfloat16()
    embedding = Embedding(table, torch.float32)
    ids = torch.tensor([[3, 3, 9]])
    assert torch.equal(embedding(ids), table[ids].float())
    assert as_tensor(embedding.weight).data_ptr() == table.data_ptr()


@pytest.mark.parametrize(
    ("engine", "capability", "expected"),
    [("x86", "AVX2", True), ("fbgemm", "AVX512", True), ("qnnpack", "AVX2", False), ("x86", "DEFAULT", False)],
)
def test_packed_products_need_fbgemm_and_avx2(
    monkeypatch: pytest.MonkeyPatch, engine: str, capability: str, expected: bool
) -> None:
    """Elsewhere `Blocks` does the same work."""
    monkeypatch.setattr(type(torch.backends.quantized), "engine", engine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert packs() is expected


def test_columns_are_a_product_in_parts() -> None:
    """Each form multiplies its part of x, of any width, and the sum is the product with the whole weight."""
    weight, x = torch.randn(2, 48, 70, generator=torch.Generator().manual_seed(3))
    parts = weight.tensor_split(4, dim=1)
    found = Columns([Blocks([part]) for part in parts])(x[None])
    assert torch.allclose(found, x[None] @ weight.T, atol=1e-4)
    assert len({part.shape[1] for part in parts}) == 2  # 70 does not divide by 4


@needs_fbgemm
def test_projections_of_the_same_x_share_its_two_limbs_and_another_x_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split: list[Tensor] = []
    limbs = linear._limbs

    def counted(x: Tensor) -> tuple[list[Tensor], Tensor]:
        split.append(x)
        return limbs(x)

    monkeypatch.setattr(linear, "_limbs", counted)
    forms = [Int8(*quantise([random(8, 64, seed=seed)])[0]) for seed in (1, 2)]
    x, other = random(1, 3, 64), random(1, 3, 64, seed=5)
    alone = [form(x.clone()) for form in forms]
    split.clear()
    assert all(torch.equal(form(x), expected) for form, expected in zip(forms, alone, strict=True))
    assert len(split) == 1
    assert not torch.equal(forms[0](other), alone[0])
    assert len(split) == 2


# --- Gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1 << 20, 700, 1], ids=["one block", "some blocks", "a row each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leading", [(1,), (3,), (2, 5)], ids=str)
def test_a_differentiable_layer_is_a_linear_layer(
    monkeypatch: pytest.MonkeyPatch, leading: tuple[int, ...], dtype: torch.dtype, limit: int
) -> None:
    """In its value and its gradient, on the weights as they are stored, however many blocks they come in."""
    monkeypatch.setattr(linear, "_BLOCK", limit)
    weight = (random(33, 65) / 65**0.5).to(dtype)
    plain = nn.Linear(65, 33, bias=False, dtype=torch.float64)
    plain.weight = nn.Parameter(weight.double(), requires_grad=False)
    x = random(*leading, 65, seed=1).requires_grad_()
    y = x.detach().double().requires_grad_()
    grad = random(*leading, 33, seed=2)
    out, expected = Differentiable(weight)(x), plain(y)
    out.backward(grad)
    expected.backward(grad.double())
    assert x.grad is not None
    assert y.grad is not None
    assert out.dtype == x.grad.dtype == torch.float32
    assert out.shape == (*leading, 33)
    assert x.grad.shape == (*leading, 65)
    assert relative(out.detach(), expected.detach()) <= 5e-6
    assert relative(x.grad, y.grad) <= 5e-6


def test_a_differentiable_layer_holds_the_stored_weight_and_gives_it_no_gradient() -> None:
    weight = random(33, 65).bfloat16()
    layer = Differentiable(weight)
    x = random(3, 65, seed=1).requires_grad_()
    out = layer(x)
    saved = out.grad_fn.next_functions
    assert len(saved) == 2
    assert saved[1][0] is None
    out.sum().backward()
    assert layer.weight.grad is None
    assert layer.weight.data_ptr() == weight.data_ptr()
