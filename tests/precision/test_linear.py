"""Weight formats against a product in float64, and the fused product of three projections."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_scratch.precision import linear
from llama_scratch.precision import rows as rows_module
from llama_scratch.precision.lazy_weight import Weight, as_tensor
from llama_scratch.precision.linear import (
    Differentiable,
    Embedding,
    FusedLinearPart,
    FusedOutput,
    PackedLinear,
    weight_bytes,
)
from llama_scratch.precision.rows import Rows
from tests.helpers import KERNELS, gguf_reference
from tests.helpers.weights import FLOATS, FORMS, columns_per_block, quantized, weight

# (out, in), the second in blocks: a typical size, sizes that are not multiples of 8, 16 or 64, and a long row.
SHAPES = [(96, 64), (1, 1), (7, 13), (33, 65), (130, 200), (17, 8), (256, 2048)]
BLOCKS = [(9, 1), (50, 3), (33, 41)]
ROWS = [0, 1, 2, 3, 33, 200]
# Numbers of rows around the boundaries between implementations.
TOGETHER = [1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 200]


@pytest.fixture
def ops(built_kernels: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels' operators."""
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", KERNELS)
    return torch.ops.llama_scratch


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def shapes(form: str) -> list[tuple[int, int]]:
    return SHAPES if form in FLOATS else [(out, blocks * columns_per_block(form)) for out, blocks in BLOCKS]


EACH = pytest.mark.parametrize(
    ("form", "shape"), [pytest.param(form, shape, id=f"{form} {shape}") for form in FORMS for shape in shapes(form)]
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(rows: int, columns: int, *, outlier: bool = False) -> Tensor:
    """Random rows, including a row of zeros if there are several. With `outlier`, one column is 1000 times as large."""
    x = random(rows, columns, seed=1)
    if rows > 1:
        x[1] = 0
    if outlier:
        x[:, columns // 2] *= 1000
    return x


def product(x: Tensor, weight: Weight) -> Tensor:
    """x·Wᵀ in float64."""
    return x.double() @ as_tensor(weight).double().T


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm()) if len(ours) else 0.0


# --- Rows -------------------------------------------------------------------------------------


@EACH
def test_rows_give_the_product_with_the_weights_that_they_hold(way: str, form: str, shape: tuple[int, int]) -> None:
    """The only error is float32's rounding, for any number of rows."""
    held = weight(form, *shape)
    for rows in ROWS:
        for outlier in (False, True):
            x = activations(rows, shape[1], outlier=outlier)
            out = Rows([held])(x)
            assert out.shape == (rows, shape[0])
            assert out.dtype == torch.float32
            assert relative(out, product(x, held)) <= 1e-6
            assert not out[1:2].any()  # the row of zeros


@EACH
@pytest.mark.usefixtures("_threads")
def test_a_row_is_the_same_alone_and_with_others(ops: Any, form: str, shape: tuple[int, int]) -> None:
    """Bit-identical, with any number of threads."""
    held = Rows([weight(form, *shape)])
    x = activations(max(TOGETHER), shape[1], outlier=True)
    alone = torch.cat([held(row[None]) for row in x])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in TOGETHER:
            assert torch.equal(held(x[-rows:]), alone[-rows:]), (threads, rows)


@pytest.mark.parametrize("rows", [1, 3, 33])
def test_weights_below_each_other_give_what_each_gives_alone(way: str, rows: int) -> None:
    """Weights of all formats stacked along the rows, with 1 to 40 rows each."""
    weights = [weight(form, 1 + 13 * i % 40, 512, seed=i) for i, form in enumerate(FORMS)]
    x = activations(rows, 512)
    together, alone = Rows(weights)(x), torch.cat([Rows([held])(x) for held in weights], dim=-1)
    assert torch.equal(together, alone) if way == "kernels" else relative(together, alone) <= 1e-6
    assert relative(together, torch.cat([product(x, held) for held in weights], dim=-1)) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_weight_are_its_numbers_to_the_bit(ops: Any, form: str) -> None:
    """Rows for an embedding, in the order of the ids, including duplicates."""
    for shape in shapes(form):
        held = weight(form, *shape)
        ids = torch.randint(shape[0], (20,), generator=torch.Generator().manual_seed(0))
        found = ops.rows(held if isinstance(held, Tensor) else held.blocks, form, ids)  # type: ignore[attr-defined]
        assert torch.equal(found, as_tensor(held, torch.float32)[ids])


@pytest.mark.parametrize("form", gguf_reference.KINDS)
def test_blocks_with_scales_of_every_kind(ops: Any, form: str) -> None:
    """All 65,536 float16 values at each position of a scale give identical numbers, including NaN and infinity."""
    kind = gguf_reference.KINDS[form]
    for place in kind.halves:
        data = bytearray(gguf_reference.random_blocks(form, 256, kind.weights, spread=1) * 256)
        for i in range(1 << 16):
            struct.pack_into("<H", data, i * kind.size + place, i)
        held = quantized(form, torch.frombuffer(data, dtype=torch.uint8).view(1 << 16, kind.size))
        found, expected = ops.rows(held.blocks, form, torch.arange(1 << 16)), held.rows(0, 1 << 16)
        usual = expected.isfinite().all(1)
        assert usual.sum() > 60_000
        assert torch.equal(found[usual], expected[usual])
        assert not found[~usual].isfinite().all(1).any()


@pytest.mark.parametrize("form", ["float32", "float16", "bfloat16"])
def test_floats_of_every_kind(ops: Any, form: str) -> None:
    """All 16-bit numbers, and float32 with these as the upper half, including subnormals, infinity and NaN."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    upper = (bits << 16).view(torch.float32) if form == "float32" else bits.to(torch.uint16).view(FLOATS[form])
    held = upper.view(-1, 1).repeat(1, 17)
    found = ops.rows(held, form, torch.arange(1 << 16))
    assert torch.equal(found.nan_to_num(7), held.float().nan_to_num(7))
    assert torch.equal(found.isnan(), held.isnan())


@pytest.mark.parametrize("leading", [(1,), (2, 3), (1, 2, 5)], ids=str)
def test_leading_dimensions_stay(way: str, leading: tuple[int, ...]) -> None:
    """(…, in) → (…, out), each row independently, with any strides; x is not changed."""
    form = Rows([weight("bfloat16", 33, 65)])
    x = random(*leading, 2, 65, seed=1)[..., 0, :]
    before = x.clone()
    out = form(x)
    assert out.shape == (*leading, 33)
    assert torch.allclose(out.reshape(-1, 33), form(x.reshape(-1, 65)), rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("form", ["bfloat16", "Q4_K"])
def test_activations_of_16_bits_give_outputs_of_16_bits(way: str, form: str) -> None:
    """The product is computed in float32."""
    held = weight(form, 33, 256)
    x = random(3, 256, seed=1).bfloat16()
    out = Rows([held])(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, Rows([held])(x.float()).bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_hide_no_damage(way: str, value: float) -> None:
    """A NaN or infinite activation affects all of its row, but no other row."""
    x = random(3, 64)
    x[1, 7] = value
    assert Rows([weight("float16", 5, 64)])(x).isfinite().all(1).tolist() == [True, False, True]


def test_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels, with several weights of any dtype."""
    x = activations(3, 65)
    for block in (1, 65 * 3, 1 << 19):
        monkeypatch.setattr(rows_module, "WEIGHTS_PER_BLOCK", block)
        for form in FLOATS:
            held = [weight(form, rows, 65, seed=rows) for rows in (40, 7, 1)]
            assert relative(Rows(held)(x), product(x, torch.cat([as_tensor(part) for part in held]))) <= 1e-6


def test_rows_hold_the_given_tensors(ops: Any) -> None:
    """Mapped weights are not copied; `nbytes` counts the bytes that one row of x reads."""
    weights = [random(4, 8), random(3, 8).half()]
    form = Rows(weights)
    assert [as_tensor(held).data_ptr() for held in form.weights] == [held.data_ptr() for held in weights]
    assert [(parts[0].data_ptr(), name) for parts, name in form.kernel_operands] == [
        (weights[0].data_ptr(), "float32"),
        (weights[1].data_ptr(), "float16"),
    ]
    assert form.nbytes == 4 * 4 * 8 + 2 * 3 * 8


def test_one_weight_that_the_kernels_do_not_know_sends_all_through_torch(way: str) -> None:
    """For example, a transposed weight."""
    weights = [weight("Q4_0", 5, 64), random(64, 9).T]
    form = Rows(weights)
    assert form.kernel_operands == []
    x = random(3, 64)
    assert relative(form(x), torch.cat([product(x, held) for held in weights], dim=-1)) <= 1e-6


# --- Shared -----------------------------------------------------------------------------------


class Counted:
    """A format that counts its calls."""

    def __init__(self, weight: Tensor):
        self.form = Rows([weight])
        self.nbytes = self.form.nbytes
        self.kernel_operands = self.form.kernel_operands
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.form(x)


SIZES = (6, 2, 3)


def shared_parts() -> tuple[Counted, FusedOutput, Sequence[FusedLinearPart], Sequence[Tensor]]:
    weights = [random(rows, 64, seed=rows) for rows in SIZES]
    counted = Counted(torch.cat(weights))
    shared = FusedOutput(counted, SIZES)
    return counted, shared, [FusedLinearPart(shared, part) for part in range(3)], weights


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_three_projections_of_one_x_are_computed_once(order: tuple[int, ...]) -> None:
    """In any order, and again for another x. Afterwards, nothing is kept in memory."""
    counted, shared, parts, weights = shared_parts()
    for call, x in enumerate([random(2, 64), random(2, 64, seed=5), random(7, 64)], start=1):
        for part in order:
            assert relative(parts[part](x), product(x, weights[part])) <= 1e-6
        assert counted.calls == call
        assert shared._input is None
        assert not shared._pending


def test_the_same_x_again_is_computed_again() -> None:
    """No outputs are kept, because the weights may have changed."""
    counted, _, parts, _ = shared_parts()
    x = random(2, 64)
    for _ in range(2):
        for part in parts:
            part(x)
    assert counted.calls == 2


def test_a_projection_that_asks_twice_gets_an_answer() -> None:
    """An output that was already taken is computed again."""
    _, _, parts, weights = shared_parts()
    x = random(2, 64)
    for part in (0, 0, 1, 2, 1):
        assert relative(parts[part](x), product(x, weights[part])) <= 1e-6


def test_what_an_interruption_left_behind_answers_no_other_x() -> None:
    """The first projection of one x, then all three of another x, as after Ctrl-C between wq and wk."""
    counted, shared, parts, weights = shared_parts()
    parts[0](random(2, 64))
    x = random(2, 64, seed=5)
    for part in (0, 1, 2):
        assert relative(parts[part](x), product(x, weights[part])) <= 1e-6
    assert counted.calls == 2
    assert shared._input is None


# --- Bytes and the embedding ------------------------------------------------------------------


def test_weight_bytes_counts_each_weight_once() -> None:
    """torch's own layers, a single projection, and three fused projections."""
    _, _, parts, _ = shared_parts()
    model = nn.ModuleList([nn.Linear(8, 4, bias=False), PackedLinear(Rows([random(3, 8).half()])), *parts])
    assert weight_bytes(model) == 4 * 8 * 4 + 2 * 3 * 8 + 4 * sum(SIZES) * 64


def test_an_embedding_gives_rows_of_the_table_as_another_type() -> None:
    """The table is not copied."""
    table = random(10, 4).bfloat16()
    embedding = Embedding(table, torch.float32)
    ids = torch.tensor([[3, 3, 9]])
    assert torch.equal(embedding(ids), table[ids].float())
    assert as_tensor(embedding.weight).data_ptr() == table.data_ptr()


# --- Gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1 << 20, 700, 1], ids=["one block", "some blocks", "a row each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leading", [(1,), (3,), (2, 5)], ids=str)
def test_a_differentiable_layer_is_a_linear_layer(
    monkeypatch: pytest.MonkeyPatch, leading: tuple[int, ...], dtype: torch.dtype, limit: int
) -> None:
    """Value and gradient, with weights in their stored format and any number of blocks."""
    for module in (rows_module, linear):  # forward and backward
        monkeypatch.setattr(module, "WEIGHTS_PER_BLOCK", limit)
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
