"""The kernels: equal to an exact reference to the last bit on every machine, and the layer that of model.py."""

from __future__ import annotations

import ctypes
import platform
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_scratch import kernels
from llama_scratch import quantise as quantise_module
from llama_scratch.config import ModelArgs
from llama_scratch.linear import from_panels, panel_shapes, panels_of, to_panels
from llama_scratch.model import KVCache, TransformerBlock, rope_frequencies, rotations
from llama_scratch.quantise import quantise_blocks, quantize_panels
from tests.conftest import KERNELS

ALONE = Path(__file__).parent / "kernels_alone.cpp"
BLOCK = {8: 32, 4: 64}
SMALLEST = torch.finfo(torch.float32).tiny
pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", KERNELS)


# --- References -------------------------------------------------------------------------------


def quantised(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Activations (T, in) as whole numbers (T, blocks, block) and scales (T, blocks), all in float32."""
    blocks = x.view(len(x), x.shape[1] // block, block)
    most = blocks.abs().amax(-1)
    finite = most.isfinite()
    inverse = torch.where(finite & (most > 127 * SMALLEST), 127 / most, 0)
    values = torch.where(finite[..., None], (blocks * inverse[..., None]).round(), 0)
    return values, torch.where(finite, most / 127, torch.nan)


def product(x: Tensor, q: Tensor, scales: Tensor, bits: int) -> Tensor:
    """x·Wᵀ in the order that is promised: the sum of a block is exact, and blocks are added one after the other.

    q: (out, in), whole numbers; scales: (out, blocks) float16.
    """
    values, steps = quantised(x, BLOCK[bits])
    q = q.double().view(len(q), -1, BLOCK[bits])
    total = torch.zeros(len(x), len(q))
    for b in range(q.shape[1]):
        exact = (values[:, b].double() @ q[:, b].T).float()
        total = total + exact * (scales[:, b].float() * steps[:, b, None])
    return total


def packed(q: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Panels of 16 rows, as kernels.cpp describes them."""
    out, columns = q.shape
    if bits == 8:
        panels = q.to(torch.int8).view(out // 16, 16, columns // 4, 4)
    else:
        pairs = (q + 8).to(torch.uint8).view(out // 16, 16, columns // 8, 2, 4)
        panels = pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4
    return panels.transpose(1, 2).contiguous(), scales.view(out // 16, 16, -1).transpose(1, 2).contiguous()


def weight(out: int, columns: int, bits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random whole numbers (out, in), and scales (out, blocks) of both signs."""
    least, most = (-127, 128) if bits == 8 else (-8, 8)
    q = torch.randint(least, most, (out, columns), generator=generator)
    scales = torch.randn(out, columns // BLOCK[bits], generator=generator) / 100
    return q, scales.half()


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit; of what is no number there is one kind."""
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


class Alone:
    """The functions of kernels_alone.cpp, with tensors."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self._library.machine_name.restype = ctypes.c_char_p
        self.machine: str = self._library.machine_name().decode()

    def _call(self, name: str, *arguments: Tensor | int) -> Any:
        pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments]
        return getattr(self._library, name)(*pointers)

    def quantise(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        T, columns = x.shape
        values = torch.empty(T, columns, dtype=torch.int8)
        scales = torch.empty(T, columns // BLOCK[bits])
        sums = torch.empty(scales.shape, dtype=torch.int32)
        self._call("quantise_rows", x, T, columns, bits, values, scales, sums)
        return values, scales, sums

    def product(self, x: Tensor, q: Tensor, scales: Tensor, bits: int, onto: Tensor | None = None) -> Tensor:
        panels, panel_scales = packed(q, scales, bits)
        y = torch.empty(len(x), len(q)) if onto is None else onto.clone()
        self._call("product_of", x, len(x), panels, panel_scales, *q.shape, bits, y, int(onto is not None))
        return y

    def search(self, rows: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
        """Values and scales in panels; None if a weight is NaN or too large."""
        (out, columns), steps = rows.shape, torch.tensor(quantise_module._STEPS[bits])
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
    """The flags above lead to different code."""
    assert machines["plain"].machine == "any machine"
    assert machines["native"].machine != "any machine" or platform.machine() not in ("x86_64", "aarch64")
    assert "avx2" not in machines or machines["avx2"].machine == "AVX2"


def test_the_instruction_set_can_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLAMA_SCRATCH_KERNELS names it; each has flags of its own, and so a library of its own."""
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
    """For each number of rows from none to seventeen, and inputs of one block to five."""
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
    # Every 127th is a whole number of steps and a half: the even neighbour is taken.
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
    """Their blocks are the reference's; what is no number makes its block no number, and nothing else."""
    x = rows_of(kind, 5, 192)
    values, scales, sums = alone.quantise(x, bits)
    expected, steps = quantised(x, BLOCK[bits])
    assert torch.equal(values.view(expected.shape).float(), expected)
    assert same(scales, steps)
    assert torch.equal(sums, expected.sum(-1).int())
    assert int(values.min()) >= -127
    q, weight_scales = weight(48, 192, bits, torch.Generator().manual_seed(1))
    y = alone.product(x, q, weight_scales, bits)
    assert same(y, product(x, q, weight_scales, bits))
    if kind == "no numbers":
        assert y.isnan().all(1).tolist() == [True, True, True, True, False]
    elif kind not in ("huge", "the largest there is"):  # whose products may be larger than a float32 can be
        assert y.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("number", ["least", "most", "zero", "in turn"])
@pytest.mark.parametrize("kind", ["all the largest", "all the smallest", "both"])
def test_weights_at_the_ends(alone: Alone, bits: int, number: str, kind: str) -> None:
    """Sums as large as they can be: −127 and 127, nibbles 0 and 15."""
    least, most = (-127, 127) if bits == 8 else (-8, 7)
    turns = torch.tensor([least, most]).repeat(32, 96)
    q = {"least": turns * 0 + least, "most": turns * 0 + most, "zero": turns * 0, "in turn": turns}[number]
    scales = torch.ones(32, 192 // BLOCK[bits]).half()
    x = rows_of(kind, 9, 192)
    assert same(alone.product(x, q, scales, bits), product(x, q, scales, bits))


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_of_every_kind(alone: Alone, bits: int) -> None:
    """All 65,536 float16: subnormal, negative, zeros, infinite ones and those that are no numbers."""
    scales = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).view(-1, 1)
    q = torch.randint(-7, 8, (65536, BLOCK[bits]), generator=torch.Generator().manual_seed(0))
    x = rows_of("both", 1, BLOCK[bits]) / 3
    assert same(alone.product(x, q, scales, bits), product(x, q, scales, bits))


def test_a_weight_of_minus_128_is_exact_too(alone: Alone) -> None:
    """Quantization makes none below −127, but a file could hold one: |−128| is 128 as an unsigned byte."""
    q, scales = torch.full((16, 32), -128), torch.ones(16, 1).half()
    for x in (torch.full((1, 32), 127.0), torch.full((1, 32), -127.0)):
        assert same(alone.product(x, q, scales, 8), product(x, q, scales, 8))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_on_top_of_what_is_there(alone: Alone, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, scales = weight(48, 128, bits, generator)
    x, onto = torch.randn(7, 128, generator=generator), torch.randn(7, 48, generator=generator)
    assert same(alone.product(x, q, scales, bits, onto), onto + product(x, q, scales, bits))


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_sanitizers_find_nothing(name: str, tmp_path: Path) -> None:
    """Addresses and undefined behaviour, over random and extreme products and layers."""
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS", "-O1"]
    try:
        program = compile_alone(tmp_path, "program", *sanitizers, *MACHINES[name])
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no sanitizers")
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "clean\n", "")


# --- Search -----------------------------------------------------------------------------------


def weights_of(kind: str, bits: int) -> Tensor:
    """Weights (40, 256): two whole panels and half of one."""
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
    """The total error is equal within a millionth, and 99.9 % of numbers and scales are equal.

    The sums of a block are added up in another order, which decides between scales that are equally good.
    """
    rows = weights_of(kind, bits)
    found = alone.search(rows, bits)
    assert found is not None
    expected = panels_of(*quantise_blocks(rows, bits))
    error, expected_error = squared_error(rows, *found), squared_error(rows, *expected)
    assert error == pytest.approx(expected_error, rel=1e-6, abs=0)
    for part, expected_part in zip(found, expected, strict=True):
        assert float((part == expected_part).double().mean()) >= 0.999
    assert not from_panels(*found)[len(rows) :].any()


@pytest.mark.parametrize("bits", [8, 4])
def test_each_set_of_instructions_finds_the_same_bits(machines: dict[str, Alone], bits: int) -> None:
    """Rows are added up alike on each machine, so a kept file does not depend on it."""
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
    """Wherever they are; the largest that fits is taken."""
    largest = 65504.0 * (127 if bits == 8 else 7)
    for value, fits in [(largest, True), (largest * (1 + 1e-6), False), (torch.inf, False), (torch.nan, False)]:
        for sign in (1, -1):
            rows = weights_of("normal", bits)
            rows[place] = sign * value
            assert (alone.search(rows, bits) is not None) == fits, (sign, value)


@pytest.mark.parametrize("bits", [8, 4])
def test_float16_scales_are_rounded_to_the_nearest(alone: Alone, bits: int) -> None:
    """As torch rounds them, in blocks of one weight: all float16, halfway between two, and close to halfway."""
    block, step = BLOCK[bits], 127 if bits == 8 else 7
    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    between = (halves[1:] + halves[:-1]) / 2  # exact in float32
    sizes = torch.cat([halves, between, between * (1 - 2**-20), between * (1 + 2**-20)])
    rows = torch.zeros(len(sizes), block)
    rows[:, 3] = sizes * step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantise_module, "_STEPS", {bits: [float(step)]})
        found = alone.search(rows, bits)
        assert found is not None
        expected = panels_of(*quantise_blocks(rows, bits))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


# --- As torch calls them ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def ops(built_kernels: None) -> Any:
    """The operators."""
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
    """The reference, to the bit, however many rows and threads."""
    generator = torch.Generator().manual_seed(0)
    q, scales = weight(16 * 7, 192, bits, generator)
    x = torch.randn(17, 192, generator=generator)
    panels, expected = packed(q, scales, bits), product(x, q, scales, bits)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for T in range(18):
            assert same(ops.linear(x[17 - T :], *panels), expected[17 - T :]), (threads, T)


@pytest.mark.parametrize("T", [1, 5])
def test_what_does_not_fit_is_an_error(ops: Any, T: int) -> None:
    """And nothing is read or written beyond an end."""
    panels, scales = packed(*weight(32, 128, 8, torch.Generator().manual_seed(0)), 8)
    x = torch.randn(T, 128)
    wrong: list[tuple[Tensor, ...]] = [
        (x[:, :64], panels, scales),
        (x.double(), panels, scales),
        (torch.randn(T, 256)[:, ::2], panels, scales),
        (x[0], panels, scales),
        (x, panels[:1], scales),
        (x, panels, scales[:, :2].contiguous()),
        (x, panels, scales.float()),
        (x, panels.transpose(2, 3), scales),
        (x, panels.view(2, 32, 4, 16), scales),
        (x, panels.half(), scales),
        (x, panels, scales.view(-1)),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match=r"does not fit|no panels"):
            ops.linear(*arguments)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.usefixtures("_threads")
def test_panels_are_searched_for_by_the_kernels(ops: Any, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From rows of any type, of several weights, on any number of threads; not on top of a curvature."""
    rows = weights_of("normal", bits)
    for weights in ([rows], [rows.bfloat16()], [rows[:5], rows[5:]], [rows[:, :200]], [rows[:3, :7].half()]):
        with monkeypatch.context() as patch:
            patch.setenv("LLAMA_SCRATCH_KERNELS", "0")
            expected = to_panels(weights, bits)
        with monkeypatch.context() as patch:
            patch.setattr("llama_scratch.linear.quantise_blocks", None)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(to_panels(weights, bits))
        for values, scales in found:
            assert torch.equal(values, found[0][0])
            assert torch.equal(scales, found[0][1])
            assert float((values == expected[0]).double().mean()) >= 0.999
            assert float((scales == expected[1]).double().mean()) >= 0.999


@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernels_raise_what_python_raises(ops: Any, bits: int) -> None:
    """The same message, for the same weights."""
    for value in (torch.nan, torch.inf, -torch.inf, 1e7):
        rows = weights_of("normal", bits)
        rows[37, 101] = value
        messages = []
        for quantize in (quantise_blocks, quantize_panels):
            with pytest.raises(ValueError, match="not finite") as raised:
                quantize(rows, bits)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    with pytest.raises(ValueError, match="expected a multiple of"):
        quantize_panels(torch.randn(2, 33), bits)
    for wrong in (torch.randn(4, 33), torch.randn(4, 64).double(), torch.randn(64), torch.randn(64, 4).T):
        with pytest.raises(RuntimeError, match="do not fit"):
            ops.quantize(wrong, [127.0], bits)
    with pytest.raises(RuntimeError, match="do not fit"):
        ops.quantize(torch.randn(4, 64), [127.0], 5)


class Rounding(nn.Module):
    """x·Wᵀ in float64, with activations as the kernels see them."""

    def __init__(self, weight: Tensor, bits: int):
        super().__init__()
        self._weight, self._bits = weight.double(), bits

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        values, scales = quantised(rows, BLOCK[self._bits])
        rounded = (values.double() * scales[..., None].double()).view(rows.shape)
        return F.linear(rounded, self._weight).float().view(*x.shape[:-1], -1)


class Case:
    """A layer with random weights, as a block of model.py and as the kernels want it, behind `start` tokens."""

    def __init__(self, bits: int, head_dim: int, group: int, start: int, T: int, layers: int = 1, width: int = 0):
        generator = torch.Generator().manual_seed(start + T)
        n_kv_heads, ffn_dim = max(1, 64 // head_dim // group), 192
        dim = n_kv_heads * group * head_dim
        if dim % 64:
            n_kv_heads, dim = 2 * n_kv_heads, 2 * dim
        q_dim, dim = dim, width or dim
        heads = n_kv_heads * group
        self.args = ModelArgs(dim, layers, heads, n_kv_heads, 32, ffn_dim, 1e-5, 1e4, None, 2048, head_dim=head_dim)
        self.bits, self.start, self.T = bits, start, T
        self.x = torch.randn(T, dim, generator=generator)
        kv_dim = n_kv_heads * head_dim
        self.blocks, self.weights = [], []
        for _ in range(layers):
            block = TransformerBlock(self.args)
            outs = {"wqkv": q_dim + 2 * kv_dim, "wo": dim, "w13": 2 * ffn_dim, "w2": dim}
            ins = {"wqkv": dim, "wo": q_dim, "w13": dim, "w2": ffn_dim}
            stored: dict[str, Tensor] = {}
            norms = [torch.rand(dim, generator=generator) + 0.5 for _ in range(2)]
            self.weights += norms
            for name, out in outs.items():
                q, scales = weight(out, ins[name], bits, generator)
                scales = (scales.float() * (0.2 if bits == 8 else 3)).half()
                stored[name] = q * scales.float().repeat_interleave(BLOCK[bits], 1)
                self.weights += packed(q, scales, bits)
            block.attention_norm.weight.data, block.ffn_norm.weight.data = norms
            wq, wk, wv = (Rounding(w, bits) for w in torch.split(stored["wqkv"], [q_dim, kv_dim, kv_dim]))
            w1, w3 = (Rounding(w, bits) for w in stored["w13"].chunk(2))
            for part, modules in (
                (block.attention, {"wq": wq, "wk": wk, "wv": wv, "wo": Rounding(stored["wo"], bits)}),
                (block.feed_forward, {"w1": w1, "w3": w3, "w2": Rounding(stored["w2"], bits)}),
            ):
                for name, module in modules.items():
                    delattr(part, name)
                    setattr(part, name, module)
            self.blocks.append(block)
        shape = (n_kv_heads, start, head_dim)
        self.past = [torch.randn(shape, generator=generator) for _ in range(2 * layers)]
        self.freqs_cis = rotations(rope_frequencies(self.args), torch.arange(start, start + T))

    def cache(self) -> list[Tensor]:
        """The kernels' cache, just as long as it has to be."""
        n_kv_heads, head_dim = self.args.n_kv_heads, self.args.head_dim
        held = [torch.full((n_kv_heads, self.start + self.T, head_dim), torch.nan) for _ in self.past]
        for new, old in zip(held, self.past, strict=True):
            new[:, : self.start] = old
        return held

    def arguments(self) -> dict[str, Any]:
        return {
            "x": self.x.clone(),
            "weights": self.weights,
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


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("head_dim", "group"), [(16, 4), (32, 2), (64, 3), (64, 1), (128, 2)])
@pytest.mark.parametrize(("start", "T"), [(0, 1), (0, 5), (254, 4), (255, 1), (256, 2), (600, 3)])
def test_a_layer_is_that_of_the_network(ops: Any, bits: int, head_dim: int, group: int, start: int, T: int) -> None:
    """Within a ten-thousandth of its largest number, with the same rounded activations; the cache too.

    In one token at most a rounding may fall to the other side, as the two add up in different orders.
    """
    compared(Case(bits, head_dim, group, start, T), ops)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("head_dim", "width"), [(64, 128), (32, 192), (128, 64)])
def test_heads_together_wider_or_narrower_than_the_residual_stream(
    ops: Any, bits: int, head_dim: int, width: int
) -> None:
    compared(Case(bits, head_dim, 3, 20, 2, width=width), ops)


def compared(case: Case, ops: Any) -> None:
    """Run a layer in the kernels and in the network, and compare."""
    start = case.start
    x, cache = called(ops, case)
    expected, held = case.expected()
    assert (expected - case.x).abs().max() > 0.1
    error = (x - expected).abs().amax(-1) / expected.abs().max()
    assert (error > 1e-4).sum() <= 1, error
    assert error.max() < 1e-2
    for mine, theirs in zip(cache, held, strict=True):
        assert torch.equal(mine[:, :start], theirs[:, :start])
        assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("start", [0, 253, 600])
@pytest.mark.usefixtures("_threads")
def test_layers_are_the_same_to_the_bit_in_any_pieces(ops: Any, bits: int, start: int) -> None:
    """Five tokens at once or in turn, two layers at once or in turn, on any number of threads."""
    case = Case(bits, 32, 2, start, 5, layers=2)
    x, cache = called(ops, case)
    assert x.isfinite().all()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again, held = called(ops, case)
        assert same(x, again)
        assert all(map(same, cache, held))
    together = case.arguments()
    single = case.x.clone()
    for t in range(5):
        row, freqs_cis = single[t : t + 1], together["freqs_cis"][t : t + 1]
        arguments = together | {"x": row, "freqs_cis": freqs_cis, "start": start + t}
        for layer in range(2):
            arguments["weights"] = case.weights[10 * layer : 10 * (layer + 1)]
            arguments["cache"] = together["cache"][2 * layer : 2 * (layer + 1)]
            ops.layers(*arguments.values())
    assert same(single, x)
    assert all(map(same, together["cache"], cache))


def test_a_layer_that_does_not_fit_is_an_error(ops: Any) -> None:
    """And writes nothing beyond the cache's end."""
    case = Case(8, 32, 2, 10, 2)
    usual = case.arguments()
    swapped = [*case.weights[:2], *case.weights[4:6], *case.weights[2:4], *case.weights[6:]]
    wrong: list[dict[str, Any]] = [
        {"start": 11},
        {"start": -1},
        {"weights": case.weights[:9]},
        {"weights": []},
        {"weights": swapped},
        {"weights": [*case.weights[:6], *Case(4, 32, 2, 10, 2).weights[6:8], *case.weights[8:]]},
        {"weights": [case.weights[0].double(), *case.weights[1:]]},
        {"cache": usual["cache"][:1]},
        {"cache": [usual["cache"][0], usual["cache"][1][:, :-1].contiguous()]},
        {"cache": [part.transpose(0, 1) for part in usual["cache"]]},
        {"cache": [part.double() for part in usual["cache"]]},
        {"freqs_cis": usual["freqs_cis"][:1]},
        {"x": usual["x"].double()},
        {"x": usual["x"].repeat(1, 2)[:, ::2]},
        {"n_heads": 4},
        {"n_heads": 1},
    ]
    for change in wrong:
        with pytest.raises(RuntimeError, match=r"fit together|ten weights"):
            called(ops, case, **change)


def test_activations_that_are_no_numbers_stay_visible(ops: Any) -> None:
    """In their own token, through a whole layer; the others are as they would have been."""
    case = Case(8, 32, 2, 0, 3)
    x, _ = called(ops, case)
    bad = case.x.clone()
    bad[2, 7] = torch.nan
    got, _ = called(ops, case, x=bad)
    assert got[2].isnan().all()
    assert same(got[:2], x[:2])
