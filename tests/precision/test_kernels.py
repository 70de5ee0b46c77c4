"""The kernels for each instruction set: panels bit for bit, rows and attention to rounding, whole layers."""

from __future__ import annotations

import ctypes
import platform
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_scratch.config import ModelArgs
from llama_scratch.model import KVCache, TransformerBlock, rope_frequencies, rotations
from llama_scratch.precision import kernels
from llama_scratch.precision import quantize as quantize_module
from llama_scratch.precision.lazy_weight import GGUFBlockWeight, Weight, as_tensor
from llama_scratch.precision.panels import from_panels, panel_shapes, panels_of, to_panels
from llama_scratch.precision.quantize import quantize_blocks, quantize_panels
from tests.helpers import KERNELS, weights
from tests.helpers.weights import FORMS, columns_per_block

ALONE = Path(__file__).parent / "kernels_alone.cpp"
BLOCK = {8: 32, 4: 64}
SMALLEST = torch.finfo(torch.float32).tiny
pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", KERNELS)


# --- References -------------------------------------------------------------------------------


def quantized(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantize activations (T, in) to integers (T, blocks, block) and scales (T, blocks), all as float32."""
    blocks = x.view(len(x), x.shape[1] // block, block)
    most = blocks.abs().amax(-1)
    finite = most.isfinite()
    inverse = torch.where(finite & (most > 127 * SMALLEST), 127 / most, 0)
    values = torch.where(finite[..., None], (blocks * inverse[..., None]).round(), 0)
    return values, torch.where(finite, most / 127, torch.nan)


def product(x: Tensor, q: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Compute x·Wᵀ in the guaranteed order: the sum of a block is exact, and blocks are added in sequence.

    q: (out, in), integers; scales: (out, blocks) float16.
    """
    values, steps = quantized(x, BLOCK[bits])
    q = q.double().view(len(q), -1, BLOCK[bits])
    total = torch.zeros(len(x), len(q))
    for b in range(q.shape[1]):
        exact = (values[:, b].double() @ q[:, b].T).float()
        total = total + exact * (scales[:, b].float() * steps[:, b, None])
    return total


def packed(q: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Panels of 16 rows, in the layout of cpp/panels.h."""
    out, columns = q.shape
    if bits == 8:
        panels = q.to(torch.int8).view(out // 16, 16, columns // 4, 4)
    else:
        pairs = (q + 8).to(torch.uint8).view(out // 16, 16, columns // 8, 2, 4)
        panels = pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4
    return panels.transpose(1, 2).contiguous(), scales.view(out // 16, 16, -1).transpose(1, 2).contiguous()


def weight(out: int, columns: int, bits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random integers (out, in), and scales (out, blocks) of both signs."""
    least, most = (-127, 128) if bits == 8 else (-8, 8)
    q = torch.randint(least, most, (out, columns), generator=generator)
    scales = torch.randn(out, columns // BLOCK[bits], generator=generator) / 100
    return q, scales.half()


def tensor_of(held: Weight) -> Tensor:
    """The tensors of a weight that the kernels read."""
    assert isinstance(held, Tensor | GGUFBlockWeight)
    return held.blocks if isinstance(held, GGUFBlockWeight) else held


def same(a: Tensor, b: Tensor) -> bool:
    """Bit-identical, except that all NaN are equal."""
    odd = a.isnan()
    return torch.equal(odd, b.isnan()) and torch.equal(a[~odd].view(torch.int32), b[~odd].view(torch.int32))


# --- Without torch, for each set of instructions ----------------------------------------------


def compile_alone(folder: Path, name: str, *flags: str) -> Path:
    found = kernels.compiler()
    assert found
    path = folder / name
    usual = ["-std=c++20", "-O2", "-ffp-contract=off", "-w", "-Wno-psabi", *flags, str(ALONE), "-o", str(path)]
    subprocess.run([*shlex.split(found), *usual], check=True, timeout=120)
    return path


NATIVE = next(flag for flag in kernels._flags() if flag.endswith("=native"))
MACHINES = {"native": [NATIVE], "plain": ["-DLLAMA_SCRATCH_PLAIN"]}
if platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
    MACHINES["avx2"] = ["-march=x86-64-v3"]


# The names of `Type` in cpp/rows.h.
TYPES = [
    "int8",
    "int4",
    "float32",
    "float16",
    "bfloat16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
]


class Alone:
    """The functions of kernels_alone.cpp, called with tensors."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self._library.machine_name.restype = ctypes.c_char_p
        self.machine: str = self._library.machine_name().decode()

    def _call(self, name: str, *arguments: Tensor | int) -> Any:
        pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments]
        return getattr(self._library, name)(*pointers)

    def round(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        T, columns = x.shape
        values = torch.empty(T, columns, dtype=torch.int8)
        scales = torch.empty(T, columns // BLOCK[bits])
        sums = torch.empty(scales.shape, dtype=torch.int32)
        self._call("round_rows", x, T, columns, bits, values, scales, sums)
        return values, scales, sums

    def product(self, x: Tensor, q: Tensor, scales: Tensor, bits: int, onto: Tensor | None = None) -> Tensor:
        panels, panel_scales = packed(q, scales, bits)
        y = torch.empty(len(x), len(q)) if onto is None else onto.clone()
        self._call("product_of", x, len(x), panels, panel_scales, int(bits == 4), *q.shape, y, int(onto is not None))
        return y

    def rows_product(self, x: Tensor, form: str, held: Tensor, onto: Tensor | None = None) -> Tensor:
        """Product of x and a weight in its file's format."""
        y = torch.empty(len(x), len(held)) if onto is None else onto.clone()
        self._call(
            "product_of", x, len(x), held, 0, TYPES.index(form), *y.shape[1:], x.shape[1], y, int(onto is not None)
        )
        return y

    def rows(self, form: str, held: Tensor, columns: int) -> Tensor:
        """Dequantized rows of a weight."""
        y = torch.empty(len(held), columns)
        self._call("rows_of", held, TYPES.index(form), *y.shape, y)
        return y

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Same as the operator."""
        out, (T, n_heads, head_dim), (n_kv_heads, S, _) = torch.empty_like(q), q.shape, k.shape
        self._call("attention_of", q, T, k, v, S, S - T, n_heads, n_kv_heads, head_dim, out)
        return out

    def search(self, rows: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
        """Values and scales in panels; None if a weight is NaN or too large."""
        (out, columns), steps = rows.shape, torch.tensor(quantize_module._STEPS[bits])
        shapes = panel_shapes((out, columns), bits)
        values = torch.empty(shapes[0], dtype=torch.int8 if bits == 8 else torch.uint8)
        scales = torch.empty(shapes[1], dtype=torch.float16)
        self._library.search_of.restype = ctypes.c_bool
        arguments = (rows, out, columns, bits, steps, len(steps), values, scales)
        return (values, scales) if self._call("search_of", *arguments) else None


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Alone]:
    folder = tmp_path_factory.mktemp("alone")
    return {name: Alone(compile_alone(folder, f"{name}.so", "-shared", "-fPIC", *MACHINES[name])) for name in MACHINES}


@pytest.fixture(params=MACHINES)
def alone(machines: dict[str, Alone], request: pytest.FixtureRequest) -> Alone:
    return machines[request.param]


def test_each_set_of_instructions_is_meant(machines: dict[str, Alone]) -> None:
    """The flags above compile to different code."""
    assert machines["plain"].machine == "any machine"
    assert machines["native"].machine != "any machine" or platform.machine() not in ("x86_64", "aarch64")
    assert "avx2" not in machines or machines["avx2"].machine == "AVX2"


def test_the_instruction_set_can_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLAMA_SCRATCH_KERNELS selects it. Each one has its own flags, and so its own library."""
    keys = set()
    for name in ("avx2", "plain", "native", ""):
        monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", name)
        flags = kernels.INSTRUCTION_SETS.get(name, [NATIVE])
        assert set(flags) <= set(kernels._flags())
        assert (NATIVE in kernels._flags()) == (name in ("native", ""))
        keys.add(kernels._key())
    assert len(keys) == 3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("panels", [1, 2, 3, 5])
def test_products_are_equal_to_the_last_bit(alone: Alone, bits: int, panels: int) -> None:
    """Zero to seventeen rows, and inputs of one to five blocks."""
    generator = torch.Generator().manual_seed(panels)
    for T, blocks in ((T, (1, 2, 3, 5)[T % 4]) for T in range(18)):
        columns = blocks * BLOCK[bits]
        q, scales = weight(16 * panels, columns, bits, generator)
        x = torch.randn(T, columns, generator=generator) * torch.rand(T, columns, generator=generator).pow(4) * 50
        assert same(alone.product(x, q, scales, bits), product(x, q, scales, bits)), (T, blocks)


def rows_of(kind: str, T: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(T, columns, generator=generator)
    sign = usual.sign()
    # Ties, n + 0.5 steps, which are rounded to even.
    halves = torch.arange(T * columns).view(T, columns).remainder(127) + 0.5
    halves[:, ::32] = 127
    mixed = usual.clone()
    for t, (place, number) in enumerate([(3, torch.nan), (31, torch.inf), (0, -torch.inf), (9, torch.nan)]):
        mixed[t : t + 1, place] = number
    return {
        "all the largest": torch.full((T, columns), 127.0),
        "all the smallest": torch.full((T, columns), -127.0),
        "both": 127 * sign,
        "halves": halves * sign,
        "zeros": torch.zeros(T, columns),
        "a block of zeros": usual * (torch.arange(columns) >= 64),
        "subnormal": usual * 1e-41,
        "around the smallest": usual * SMALLEST * 127 * torch.logspace(-2, 1, T)[:, None],
        "huge": (usual * 1e38).clamp(-3e38, 3e38),
        "the largest there is": sign * torch.finfo(torch.float32).max,
        "an outlier": usual + 1e4 * (torch.arange(columns) == 5),
        "no numbers": mixed,
    }[kind]


KINDS = ["all the largest", "all the smallest", "both", "halves", "zeros", "a block of zeros", "subnormal"]
KINDS += ["around the smallest", "huge", "the largest there is", "an outlier", "no numbers"]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_every_kind(alone: Alone, kind: str, bits: int) -> None:
    """Blocks are equal to the reference. NaN and infinity affect only their own block."""
    x = rows_of(kind, 5, 192)
    values, scales, sums = alone.round(x, bits)
    expected, steps = quantized(x, BLOCK[bits])
    assert torch.equal(values.view(expected.shape).float(), expected)
    assert same(scales, steps)
    assert torch.equal(sums, expected.sum(-1).int())
    assert int(values.min()) >= -127
    q, weight_scales = weight(48, 192, bits, torch.Generator().manual_seed(1))
    y = alone.product(x, q, weight_scales, bits)
    assert same(y, product(x, q, weight_scales, bits))
    if kind == "no numbers":
        assert y.isnan().all(1).tolist() == [True, True, True, True, False]
    elif kind not in ("huge", "the largest there is"):  # their products can exceed the range of float32
        assert y.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("number", ["least", "most", "zero", "in turn"])
@pytest.mark.parametrize("kind", ["all the largest", "all the smallest", "both"])
def test_weights_at_the_ends(alone: Alone, bits: int, number: str, kind: str) -> None:
    """The largest possible sums: −127 and 127, and 4-bit values 0 and 15."""
    least, most = (-127, 127) if bits == 8 else (-8, 7)
    turns = torch.tensor([least, most]).repeat(32, 96)
    q = {"least": turns * 0 + least, "most": turns * 0 + most, "zero": turns * 0, "in turn": turns}[number]
    scales = torch.ones(32, 192 // BLOCK[bits]).half()
    x = rows_of(kind, 9, 192)
    assert same(alone.product(x, q, scales, bits), product(x, q, scales, bits))


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_of_every_kind(alone: Alone, bits: int) -> None:
    """All 65,536 float16 values: subnormal, negative, zero, infinity and NaN."""
    scales = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).view(-1, 1)
    q = torch.randint(-7, 8, (65536, BLOCK[bits]), generator=torch.Generator().manual_seed(0))
    x = rows_of("both", 1, BLOCK[bits]) / 3
    assert same(alone.product(x, q, scales, bits), product(x, q, scales, bits))


def test_a_weight_of_minus_128_is_exact_too(alone: Alone) -> None:
    """Quantization stops at −127, but a file could contain −128: |−128| is 128 as an unsigned byte."""
    q, scales = torch.full((16, 32), -128), torch.ones(16, 1).half()
    for x in (torch.full((1, 32), 127.0), torch.full((1, 32), -127.0)):
        assert same(alone.product(x, q, scales, 8), product(x, q, scales, 8))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_on_top_of_what_is_there(alone: Alone, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, scales = weight(48, 128, bits, generator)
    x, onto = torch.randn(7, 128, generator=generator), torch.randn(7, 48, generator=generator)
    assert same(alone.product(x, q, scales, bits, onto), onto + product(x, q, scales, bits))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blocks", [1, 3, 41])
def test_rows_are_the_same_whatever_rows_go_along(alone: Alone, form: str, blocks: int) -> None:
    """Bit-identical in any batch, within 1e-6 of float64, also if added to y; dequantized rows are exact."""
    columns = blocks * columns_per_block(form)
    weight = weights.weight(form, 31, columns)
    held, numbers = tensor_of(weight), as_tensor(weight, torch.float32)
    assert torch.equal(alone.rows(form, held, columns), numbers)
    x = torch.randn(33, columns, generator=torch.Generator().manual_seed(0))
    y, expected = alone.rows_product(x, form, held), x.double() @ numbers.double().T
    assert (y - expected).norm() <= 1e-6 * expected.norm()
    for T in (0, 1, 2, 3, 4, 5, 15, 16, 17):
        assert same(alone.rows_product(x[:T], form, held), y[:T]), T
    assert same(alone.rows_product(x, form, held, onto=y), y + y) or columns > 512  # spans are added in sequence
    assert (alone.rows_product(x, form, held, onto=y) - 2 * expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("start", [0, 250, 600])
@pytest.mark.parametrize("head_dim", [16, 48, 64])
def test_attention_is_the_same_whatever_tokens_go_along(alone: Alone, head_dim: int, start: int) -> None:
    """Bit-identical on each machine, and within 1e-5 of float64."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(20, 6, head_dim, generator=generator)
    k, v = torch.randn(2, 2, start + 20, head_dim, generator=generator)
    out = alone.attention(q, k, v)
    keys, values = (part.double().repeat_interleave(3, 0) for part in (k, v))
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) / head_dim**0.5
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(start + 1)
    expected = (scores.masked_fill(future, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    assert (out - expected).norm() <= 1e-5 * expected.norm()
    for t, T in ((0, 1), (1, 3), (4, 16), (19, 1)):
        end = start + t + T
        part = alone.attention(q[t : t + T], k[:, :end].contiguous(), v[:, :end].contiguous())
        assert same(part, out[t : t + T]), (t, T)


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_sanitizers_find_nothing(name: str, tmp_path: Path) -> None:
    """Address and undefined-behavior sanitizers, on random and extreme products, attention and layers."""
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS", "-O1"]
    try:
        program = compile_alone(tmp_path, "program", *sanitizers, *MACHINES[name])
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no sanitizers")
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "clean\n", "")


# --- Search -----------------------------------------------------------------------------------


def weights_of(kind: str, bits: int) -> Tensor:
    """Weights (40, 256): two and a half panels."""
    usual = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    largest = 65504 * (127 if bits == 8 else 7)
    return {
        "normal": usual,
        "heavy-tailed": usual**3,
        "zeros": usual * 0,
        "a block of zeros": usual * (torch.arange(256) >= 64),
        "subnormal scales": usual * 1e-6,
        "scales that round to zero": usual * 1e-8,
        "squares that are zero": usual * 1e-30,
        "constant": usual[:, :1].repeat(1, 256),
        "two values": usual[:, :1] * usual.sign(),
        "an outlier per block": usual + 500 * (torch.arange(256) % 32 == 5),
        "one sign": usual.abs(),
        "the largest": (usual / usual.abs().max() * largest),
    }[kind]


WEIGHTS = ["normal", "heavy-tailed", "zeros", "a block of zeros", "subnormal scales", "scales that round to zero"]
WEIGHTS += ["squares that are zero", "constant", "two values", "an outlier per block", "one sign", "the largest"]


def squared_error(rows: Tensor, values: Tensor, scales: Tensor) -> float:
    return float((rows - from_panels(values, scales)[: len(rows)]).double().square().sum())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_search_is_that_of_python(alone: Alone, kind: str, bits: int) -> None:
    """The total error agrees within a millionth, and 99.9 % of numbers and scales are equal.

    The order of summation differs, which decides between scales with equal errors.
    """
    rows = weights_of(kind, bits)
    found = alone.search(rows, bits)
    assert found is not None
    expected = panels_of(*quantize_blocks(rows, bits))
    error, expected_error = squared_error(rows, *found), squared_error(rows, *expected)
    assert error == pytest.approx(expected_error, rel=1e-6, abs=0)
    for part, expected_part in zip(found, expected, strict=True):
        assert float((part == expected_part).double().mean()) >= 0.999
    assert not from_panels(*found)[len(rows) :].any()


@pytest.mark.parametrize("bits", [8, 4])
def test_each_set_of_instructions_finds_the_same_bits(machines: dict[str, Alone], bits: int) -> None:
    """The order of summation is the same on each machine, so cached files do not depend on it."""
    for kind in WEIGHTS:
        found = [machine.search(weights_of(kind, bits), bits) for machine in machines.values()]
        for other in found[1:]:
            assert found[0] is not None
            assert other is not None
            assert torch.equal(found[0][0], other[0]), kind
            assert torch.equal(found[0][1].view(torch.int16), other[1].view(torch.int16)), kind


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("place", [(0, 0), (17, 101), (39, 255)])
def test_the_search_rejects_nan_and_too_large_weights(alone: Alone, bits: int, place: tuple[int, int]) -> None:
    """At any index. The largest weight that fits is accepted."""
    largest = 65504.0 * (127 if bits == 8 else 7)
    for value, fits in [(largest, True), (largest * (1 + 1e-6), False), (torch.inf, False), (torch.nan, False)]:
        for sign in (1, -1):
            rows = weights_of("normal", bits)
            rows[place] = sign * value
            assert (alone.search(rows, bits) is not None) == fits, (sign, value)


@pytest.mark.parametrize("bits", [8, 4])
def test_float16_scales_are_rounded_to_the_nearest(alone: Alone, bits: int) -> None:
    """Rounding as in torch, with a block size of one: all float16, ties, and values close to ties."""
    block, step = BLOCK[bits], 127 if bits == 8 else 7
    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    between = (halves[1:] + halves[:-1]) / 2  # exact in float32
    sizes = torch.cat([halves, between, between * (1 - 2**-20), between * (1 + 2**-20)])
    rows = torch.zeros(len(sizes), block)
    rows[:, 3] = sizes * step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_module, "_STEPS", {bits: [float(step)]})
        found = alone.search(rows, bits)
        assert found is not None
        expected = panels_of(*quantize_blocks(rows, bits))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


# --- As torch operators -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def ops(built_kernels: None) -> Any:
    """The kernels' operators."""
    assert kernels.ready()
    machine = torch.ops.llama_scratch.machine()
    assert kernels.state() == f"compiled for {machine}"
    assert machine == {"avx2": "AVX2", "plain": "any machine"}.get(KERNELS, machine)
    return torch.ops.llama_scratch


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.usefixtures("_threads")
def test_a_row_depends_on_no_other_and_on_no_number_of_threads(ops: Any, bits: int) -> None:
    """Bit-identical to the reference for any number of rows and threads."""
    generator = torch.Generator().manual_seed(0)
    q, scales = weight(16 * 7, 192, bits, generator)
    x = torch.randn(17, 192, generator=generator)
    panels, expected = packed(q, scales, bits), product(x, q, scales, bits)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for T in range(18):
            assert same(ops.linear(x[17 - T :], panels, [f"int{bits}"]), expected[17 - T :]), (threads, T)


@pytest.mark.parametrize("T", [1, 5])
def test_what_does_not_fit_is_an_error(ops: Any, T: int) -> None:
    """Nothing is read or written out of bounds."""
    panels, scales = packed(*weight(32, 128, 8, torch.Generator().manual_seed(0)), 8)
    x, w, blocks = torch.randn(T, 128), torch.randn(7, 128), torch.zeros(7, 72, dtype=torch.uint8)
    one = ["float32"]
    wrong: list[tuple[Tensor, list[Tensor], list[str]]] = [
        *((x, [panels[:1], scales], [name]) for name in ("int8", "int4")),
        (x[:, :64], [panels, scales], ["int8"]),
        (x, [panels, scales], ["int4"]),
        (x, [panels], ["int8"]),
        (x, [panels, scales[:, :2].contiguous()], ["int8"]),
        (x, [panels, scales.float()], ["int8"]),
        (x, [panels.transpose(2, 3), scales], ["int8"]),
        (x, [panels.view(2, 32, 4, 16), scales], ["int8"]),
        (x, [panels.half(), scales], ["int8"]),
        (x, [panels, scales.view(-1)], ["int8"]),
        (x, [panels, scales, w], ["int8", "float32"]),
        (x, [w, panels, scales], ["float32", "int8"]),
        (x.double(), [w], one),
        (torch.randn(T, 256)[:, ::2], [w], one),
        (x[0], [w], one),
        (x[:, :64].contiguous(), [w], one),
        (x, [w[:, :64].contiguous()], one),
        (x, [w.T.contiguous().T], one),
        (x, [w[None]], one),
        (x, [w.half()], one),
        (x, [w], ["float16"]),
        (x, [w, w[:, :64].contiguous()], ["float32", "float32"]),
        (x, [w], ["float32", "float32"]),
        (x, [w], ["Q3_K"]),
        (x, [w], []),
        (x, [blocks], ["Q8_0"]),  # 72 bytes: not whole blocks of 34
        (x, [blocks[:, :54].contiguous()], ["Q4_0"]),
        (x, [blocks[:, ::2]], ["Q4_0"]),
        (x, [blocks.view(torch.int8)], ["Q4_0"]),
    ]
    assert ops.linear(x, [blocks], ["Q4_0"]).shape == (T, 7)
    for arguments in wrong:
        with pytest.raises(
            RuntimeError,
            match=r"x has|not \d-bit|contain rows|not whole|No kernel|no weights|is missing|stacked",
        ):
            ops.linear(*arguments)
    for id in (-1, 7, 1 << 40):
        with pytest.raises(IndexError, match=f"There is no row {id}. Choose one from 0 to 6"):
            ops.rows(w, "float32", torch.tensor([0, id]))
    for ids in (torch.tensor([[0]]), torch.tensor([0], dtype=torch.int32), torch.arange(6)[::2]):
        with pytest.raises(RuntimeError, match="ids has the shape"):
            ops.rows(w, "float32", ids)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.usefixtures("_threads")
def test_panels_are_searched_for_by_the_kernels(ops: Any, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all dtypes, several weights and any number of threads, but not with a Hessian."""
    rows = weights_of("normal", bits)
    for held in ([rows], [rows.bfloat16()], [rows[:5], rows[5:]], [rows[:, :200]], [rows[:3, :7].half()]):
        with monkeypatch.context() as patch:
            patch.setenv("LLAMA_SCRATCH_KERNELS", "0")
            expected = to_panels(held, bits)
        with monkeypatch.context() as patch:
            patch.setattr("llama_scratch.precision.panels.quantize_blocks", None)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(to_panels(held, bits))
        for values, scales in found:
            assert torch.equal(values, found[0][0])
            assert torch.equal(scales, found[0][1])
            assert float((values == expected[0]).double().mean()) >= 0.999
            assert float((scales == expected[1]).double().mean()) >= 0.999


@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernels_raise_what_python_raises(ops: Any, bits: int) -> None:
    """The same message for the same weights."""
    for value in (torch.nan, torch.inf, -torch.inf, 1e7):
        rows = weights_of("normal", bits)
        rows[37, 101] = value
        messages = []
        for quantize in (quantize_blocks, quantize_panels):
            with pytest.raises(ValueError, match="NaN") as raised:
                quantize(rows, bits)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    with pytest.raises(ValueError, match="expected a multiple of"):
        quantize_panels(torch.randn(2, 33), bits)
    for wrong in (torch.randn(4, 33), torch.randn(4, 64).double(), torch.randn(64), torch.randn(64, 4).T):
        with pytest.raises(RuntimeError, match="cannot be quantized"):
            ops.quantize(wrong, [127.0], bits)
    with pytest.raises(RuntimeError, match="cannot be quantized to 5 bits"):
        ops.quantize(torch.randn(4, 64), [127.0], 5)


class Rounding(nn.Module):
    """x·Wᵀ in float64. For 8- and 4-bit weights, activations are rounded as in the kernels."""

    def __init__(self, weight: Tensor, form: str):
        super().__init__()
        self._weight, self._block = weight.double(), {"int8": 32, "int4": 64}.get(form)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._block:
            values, scales = quantized(rows, self._block)
            rows = (values.double() * scales[..., None].double()).view(rows.shape)
        return F.linear(rows.double(), self._weight).float().view(*x.shape[:-1], -1)


class Case:
    """A layer with random weights after `start` tokens, as a block of model.py and as operands of the kernels."""

    def __init__(self, form: str, head_dim: int, group: int, start: int, T: int, layers: int = 1, width: int = 0):
        generator = torch.Generator().manual_seed(start + T)
        grain = columns_per_block(form) if form in FORMS else 64
        n_kv_heads, ffn_dim = max(1, 64 // head_dim // group), 256 if grain == 256 else 192
        while n_kv_heads * group * head_dim % grain:
            n_kv_heads += 1
        q_dim = n_kv_heads * group * head_dim
        dim, kv_dim, heads = width or q_dim, n_kv_heads * head_dim, n_kv_heads * group
        self.args = ModelArgs(dim, layers, heads, n_kv_heads, 32, ffn_dim, 1e-5, 1e4, None, 2048, head_dim=head_dim)
        self.start, self.T = start, T
        self.x = torch.randn(T, dim, generator=generator)
        self.blocks: list[TransformerBlock] = []
        self.norms: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.types: list[str] = []
        self.parts: list[int] = []
        for layer in range(layers):
            block = TransformerBlock(self.args)
            sizes = [q_dim, kv_dim, kv_dim], [dim], [ffn_dim, ffn_dim], [dim]
            made = [
                self._add(form, outs, columns, 10 * layer + i, generator)
                for i, (outs, columns) in enumerate(zip(sizes, (dim, q_dim, dim, ffn_dim), strict=True))
            ]
            self.norms += [torch.rand(dim, generator=generator) + 0.5 for _ in range(2)]
            block.attention_norm.weight.data, block.ffn_norm.weight.data = self.norms[-2:]
            (wq, wk, wv), (wo,), (w1, w3), (w2,) = [[Rounding(w, form) for w in group] for group in made]
            for part, modules in (
                (block.attention, {"wq": wq, "wk": wk, "wv": wv, "wo": wo}),
                (block.feed_forward, {"w1": w1, "w3": w3, "w2": w2}),
            ):
                for name, module in modules.items():
                    delattr(part, name)
                    setattr(part, name, module)
            self.blocks.append(block)
        shape = (n_kv_heads, start, head_dim)
        self.past = [torch.randn(shape, generator=generator) for _ in range(2 * layers)]
        self.freqs_cis = rotations(rope_frequencies(self.args), torch.arange(start, start + T))

    def _add(self, form: str, outs: list[int], columns: int, seed: int, generator: torch.Generator) -> Sequence[Tensor]:
        """Append stacked weights to the kernels' operands. Returns their number."""
        if form in FORMS:
            made = [weights.weight(form, out, columns, seed + 100 * i) for i, out in enumerate(outs)]
            self.weights += map(tensor_of, made)
            self.types += [form] * len(outs)
            self.parts.append(len(outs))
            return [as_tensor(weight, torch.float32) for weight in made]
        bits = int(form[3:])
        q, scales = weight(sum(outs), columns, bits, generator)
        scales = (scales.float() * (0.2 if bits == 8 else 3)).half()
        self.weights += packed(q, scales, bits)
        self.types.append(form)
        self.parts.append(1)
        return torch.split(q * scales.float().repeat_interleave(BLOCK[bits], 1), outs)

    def cache(self) -> list[Tensor]:
        """The kernels' cache, with the minimum capacity."""
        n_kv_heads, head_dim = self.args.n_kv_heads, self.args.head_dim
        held = [torch.full((n_kv_heads, self.start + self.T, head_dim), torch.nan) for _ in self.past]
        for new, old in zip(held, self.past, strict=True):
            new[:, : self.start] = old
        return held

    def arguments(self) -> dict[str, Any]:
        return {
            "x": self.x.clone(),
            "norms": self.norms,
            "weights": self.weights,
            "types": self.types,
            "parts": self.parts,
            "freqs_cis": torch.view_as_real(self.freqs_cis).flatten(-2).contiguous(),
            "cache": self.cache(),
            "start": self.start,
            "n_heads": self.args.n_heads,
            "eps": self.args.norm_eps,
        }

    @torch.inference_mode()
    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """The residual stream, and each layer's keys and values."""
        cache, x, held = KVCache(self.args), self.x[None], []
        if self.start:
            for layer in range(len(self.blocks)):
                cache.update(layer, self.past[2 * layer][None], self.past[2 * layer + 1][None])
            cache.advance(self.start)
        mask = cache.mask(self.T, x.device)
        for layer, block in enumerate(self.blocks):
            x = block(x, self.freqs_cis, mask, cache, layer)
            nothing = torch.empty(1, self.args.n_kv_heads, 0, self.args.head_dim)
            cache.length += self.T
            held += [part[0] for part in cache.update(layer, nothing, nothing)]
            cache.length -= self.T
        return x[0], held


def called(ops: Any, case: Case, **changes: Any) -> tuple[Tensor, list[Tensor]]:
    arguments = case.arguments() | changes
    ops.layers(*arguments.values())
    return arguments["x"], arguments["cache"]


# As 16 and 32 bits, blocks of 32 and of 256, and panels.
EACH = pytest.mark.parametrize("form", ["float32", "float16", "bfloat16", "Q4_1", "Q4_K", "int8", "int4"])


@EACH
@pytest.mark.parametrize(("head_dim", "group"), [(16, 4), (32, 2), (64, 3), (64, 1), (128, 2)])
@pytest.mark.parametrize(("start", "T"), [(0, 1), (0, 5), (254, 4), (255, 1), (256, 2), (600, 3), (3, 40)])
def test_a_layer_is_that_of_the_network(ops: Any, form: str, head_dim: int, group: int, start: int, T: int) -> None:
    """The output and the cache are within 1e-5."""
    compared(Case(form, head_dim, group, start, T), ops)


@EACH
@pytest.mark.parametrize(("head_dim", "width"), [(64, 256), (32, 512), (128, 256)])
def test_heads_together_wider_or_narrower_than_the_residual_stream(
    ops: Any, form: str, head_dim: int, width: int
) -> None:
    compared(Case(form, head_dim, 3, 20, 2, width=width), ops)


def compared(case: Case, ops: Any) -> None:
    """Run a layer in the kernels and in the network, and compare.

    A few 8-bit activations may be rounded differently, because the order of summation differs.
    """
    start, panels = case.start, case.types[0].startswith("int")
    x, cache = called(ops, case)
    expected, held = case.expected()
    assert (expected - case.x).abs().max() > 0.1
    if panels:
        error = (x - expected).abs().amax(-1) / expected.abs().max()
        assert (error > 1e-4).sum() <= max(1, case.T // 8), error
        assert error.max() < 1e-2
    else:
        assert (x - expected).norm() <= 1e-5 * (expected - case.x).norm()
    for mine, theirs in zip(cache, held, strict=True):
        assert torch.equal(mine[:, :start], theirs[:, :start])
        assert (mine - theirs).abs().max() < (1e-4 if panels else 1e-5) * theirs.abs().max()


def in_pieces(ops: Any, case: Case, sizes: Iterable[int]) -> tuple[Tensor, list[Tensor]]:
    """Run the tokens in chunks of these sizes, each through all layers."""
    whole, x, t = case.arguments(), case.x.clone(), 0
    for size in sizes:
        part = {"x": x[t : t + size], "freqs_cis": whole["freqs_cis"][t : t + size], "start": case.start + t}
        ops.layers(*(whole | part).values())
        t += size
    assert t == len(x)
    return x, whole["cache"]


FAST = {(64, 0), (16, 1), (128, 255), (32, 700)}
PLACES = [
    pytest.param(head_dim, start, marks=() if (head_dim, start) in FAST else pytest.mark.slow)
    for head_dim in (16, 32, 64, 128)
    for start in (0, 1, 255, 256, 300, 700)
]


@EACH
@pytest.mark.parametrize(("head_dim", "start"), PLACES)
@pytest.mark.usefixtures("_threads")
def test_layers_are_the_same_to_the_bit_in_any_pieces(ops: Any, form: str, head_dim: int, start: int) -> None:
    """20 tokens in chunks of any size through two layers, with one or two threads."""
    case = Case(form, head_dim, 2, start, 20, layers=2)
    torch.set_num_threads(1)
    x, cache = in_pieces(ops, case, [1] * 20)
    assert x.isfinite().all()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for sizes in ([20], [17, 3], [2, 3, 4, 5, 6], [16, 1, 1, 1, 1]):
            found, held = in_pieces(ops, case, sizes)
            assert same(found, x), (threads, sizes)
            assert all(map(same, held, cache)), (threads, sizes)


def test_layers_may_be_run_one_by_one(ops: Any) -> None:
    case = Case("bfloat16", 32, 2, 3, 5, layers=2)
    x, cache = called(ops, case)
    single = case.arguments()
    for layer in range(2):
        part: dict[str, Any] = {"norms": case.norms[2 * layer :][:2], "weights": case.weights[7 * layer :][:7]}
        part |= {"types": case.types[:7], "parts": case.parts[:4], "cache": single["cache"][2 * layer :][:2]}
        ops.layers(*(single | part).values())
    assert same(single["x"], x)
    assert all(map(same, single["cache"], cache))


@pytest.mark.parametrize("form", ["int8", "bfloat16"])
def test_a_layer_that_does_not_fit_is_an_error(ops: Any, form: str) -> None:
    """Nothing is written beyond the cache's end."""
    case = Case(form, 32, 2, 10, 2)
    usual, w = case.arguments(), case.weights
    wrong: list[dict[str, Any]] = [
        {"start": 11},
        {"start": -1},
        {"norms": case.norms[:1]},
        {"norms": []},
        {"norms": [case.norms[0].double(), case.norms[1]]},
        {"norms": [case.norms[0][:-1], case.norms[1]]},
        {"weights": w[:-1]},
        {"weights": []},
        {"weights": w[2:]},
        {"weights": [w[0].double(), *w[1:]]},
        {"weights": [w[0][:-1], *w[1:]]},
        {"types": case.types[:-1]},
        {"types": ["float32", *case.types[1:]]},
        {"parts": case.parts[:3]},
        {"parts": [0, *case.parts[1:]]},
        {"parts": [-1, *case.parts[1:]]},
        {"parts": [*case.parts[:3], 2]},
        {"cache": usual["cache"][:1]},
        {"cache": [usual["cache"][0], usual["cache"][1][:, :-1].contiguous()]},
        {"cache": [part.transpose(0, 1) for part in usual["cache"]]},
        {"cache": [part.double() for part in usual["cache"]]},
        {"freqs_cis": usual["freqs_cis"][:1]},
        {"x": usual["x"].double()},
        {"x": usual["x"].repeat(1, 2)[:, ::2]},
        {"n_heads": 4},
        {"n_heads": 1},
        {"n_heads": 0},
        {"n_heads": -2},
    ]
    for change in wrong:
        with pytest.raises(
            RuntimeError, match=r"not match|two norms|missing|\d-bit|contain rows|no weights|There are only"
        ):
            called(ops, case, **change)


@pytest.mark.parametrize("form", ["int8", "bfloat16"])
def test_activations_that_are_nan_stay_visible(ops: Any, form: str) -> None:
    """NaN spreads to its token and later ones through a layer. Token by token, earlier ones are unaffected."""
    case = Case(form, 32, 2, 0, 3)
    x, _ = called(ops, case)
    case.x[1, 7] = torch.nan
    assert called(ops, case)[0][1:].isnan().all()
    single, _ = in_pieces(ops, case, [1, 1, 1])
    assert single[1:].isnan().all()
    assert same(single[:1], x[:1])
