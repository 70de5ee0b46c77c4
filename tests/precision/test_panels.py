"""int8 and int4 panels: products, packing, the fused layers, the cache, and damage."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_scratch.config import ModelArgs
from llama_scratch.errors import CheckpointError, OutOfMemoryError
from llama_scratch.inference import engine as engine_module
from llama_scratch.inference import loading
from llama_scratch.inference.engine import Engine
from llama_scratch.inference.fused_layers import FusedLayers
from llama_scratch.llama import Llama
from llama_scratch.model import KVCache, Transformer
from llama_scratch.precision import kernels, memory_estimate
from llama_scratch.precision import packing as packing_module
from llama_scratch.precision.calibration import CalibrationText, calibration_text
from llama_scratch.precision.dtypes import BITS
from llama_scratch.precision.memory_estimate import memory_needed
from llama_scratch.precision.network import build
from llama_scratch.precision.panels import Panels, from_panels, panel_shapes, panels_of, to_panels
from llama_scratch.precision.quantize import BLOCK_SIZE, dequantize, quantize_blocks
from llama_scratch.precision.rows import Rows
from llama_scratch.system import memory
from llama_scratch.system.jobs import BackgroundJobs
from tests.helpers import KERNELS, ROOT
from tests.helpers.checkpoints import tiny_args, write_meta
from tests.helpers.networks import CPU, forms, reference, relative, run, stored
from tests.helpers.processes import until

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")
BOUNDS = {"int8": 0.04, "int4": 0.4}
"""Relative distance of the logits from fp32's, in a random network."""
PRECISIONS = pytest.mark.parametrize("precision", BITS)
# With and without partial panels and blocks.
SHAPES = pytest.mark.parametrize("shape", [(16, 64), (5, 64), (37, 33), (48, 200), (1, 1)])


@pytest.fixture(autouse=True)
def _wanted(built_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", KERNELS)


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("LLAMA_SCRATCH_KERNELS", "0")


def panels(weight: Tensor, bits: int) -> Panels:
    return Panels(*to_panels([weight], bits), (len(weight), weight.shape[1]))


def held(form: Panels) -> Tensor:
    """Dequantized weights of panels, without padding."""
    return from_panels(form.values, form.scales)[: form.shape[0], : form.shape[1]]


# --- Products ---------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("bits", BLOCK_SIZE)
def test_panels_hold_what_was_quantized(shape: tuple[int, int], bits: int) -> None:
    """A round trip with any padding, and the predicted number of bytes."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    form = panels(weight, bits)
    filled = torch.nn.functional.pad(weight, (0, -shape[1] % BLOCK_SIZE[bits]))
    numbers, scales = quantize_blocks(filled, bits)
    assert torch.equal(held(form), dequantize(numbers, scales)[:, : shape[1]])
    assert (form.values.shape, form.scales.shape) == panel_shapes(shape, bits)
    assert not from_panels(form.values, form.scales)[shape[0] :].any()
    assert form.nbytes == form.values.nbytes + form.scales.nbytes
    assert form.whole == (shape[0] % 16 == 0 and shape[1] % BLOCK_SIZE[bits] == 0)
    assert all(torch.equal(a, b) for a, b in zip(panels_of(numbers, scales), (form.values, form.scales), strict=True))


@SHAPES
@pytest.mark.parametrize("bits", BLOCK_SIZE)
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
def test_products_are_off_by_no_more_than_activations_are_rounded(
    shape: tuple[int, int], bits: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is within the rounding of activations; without kernels, activations are not rounded.

    Rounding moves an activation by up to half a step of its block, and an output by up to Σ |ŵ| · half a step.
    """
    generator = torch.Generator().manual_seed(rows)
    form = panels(torch.randn(shape, generator=generator), bits)
    x = torch.randn(rows, shape[1], generator=generator) * torch.rand(shape[1], generator=generator).pow(6) * 30
    exact = x.double() @ held(form).double().T
    blocks = [slice(start, start + BLOCK_SIZE[bits]) for start in range(0, shape[1], BLOCK_SIZE[bits])]
    most = sum((x[:, b].abs().amax(1, keepdim=True) / 254) @ held(form)[:, b].abs().sum(1)[None] for b in blocks)
    assert ((form(x) - exact).abs() <= 1.001 * most + 1e-5 * exact.abs() + 1e-9).all()
    without_kernels(monkeypatch)
    assert torch.allclose(form(x).double(), exact, rtol=1e-4, atol=1e-4)


def test_leading_dimensions_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    form = panels(torch.randn(20, 40), 8)
    x = torch.randn(2, 3, 40)
    for _ in range(2):
        assert form(x).shape == (2, 3, 20)
        assert torch.allclose(form(x)[1, 2], form(x[1, 2]), atol=1e-5)
        without_kernels(monkeypatch)


# --- A whole network --------------------------------------------------------------------------


def built(
    source: Path, precision: str, args: ModelArgs | None = None, weights: dict[str, Tensor] | None = None
) -> tuple[Transformer, BackgroundJobs, dict[str, Tensor]]:
    """A network with completed packing, and the weights of its file."""
    args = args or tiny_args()
    weights = weights or stored(args)
    model, packing = build(weights, args, precision, CPU, [source])
    packing.wait()
    return model, packing, weights


@PRECISIONS
def test_the_network_keeps_its_promise(source: Path, precision: str) -> None:
    model, _, weights = built(source, precision)
    assert {type(form) for form in forms(model)} == {Panels}
    assert 1e-4 < relative(run(model), reference(weights)) <= BOUNDS[precision]


@PRECISIONS
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_that_fill_no_block_and_no_panel(source: Path, precision: str, *, tied: bool) -> None:
    """Heads of size 10 and a vocabulary of 555: model.py runs, because the fused layers need whole panels."""
    args = tiny_args(dim=40, n_heads=4, n_kv_heads=2, vocab_size=555, multiple_of=6)
    model, packing, weights = built(source, precision, args, stored(args, tied=tied))
    ids = torch.arange(40)[None]
    plain = Transformer(args)
    plain.load_state_dict({name: weight.float() for name, weight in weights.items()})
    assert relative(run(model, ids), run(plain, ids)) <= 2 * BOUNDS[precision]
    engine = Engine(model, 100, packing)
    assert engine._fused is not None
    assert not engine._fused.fits()
    assert torch.allclose(engine.all_logits(ids[0].tolist()), run(model, ids), atol=1e-5)


@PRECISIONS
def test_the_step_is_the_readable_network(source: Path, precision: str) -> None:
    """The fused layers agree with model.py on the same panels.

    Only the order of summation differs, and so the rounding of some activations. In a single layer, the difference is
    smaller than the precision's error; after several layers, it is about as large.
    """
    model, packing, _ = built(source, precision, tiny_args(n_layers=1))
    ids = torch.randint(556, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    engine = Engine(model, 300, packing)
    assert engine._fused is not None
    assert engine._fused.fits()
    stepped = engine.all_logits(ids)
    read = run(model, torch.tensor([ids]))
    assert 0 < relative(stepped, read) <= BOUNDS["int8"] / 4
    # The cached keys and values agree too.
    cache = KVCache(model.args, len(ids))
    with torch.inference_mode():
        model(torch.tensor([ids]), cache)
    for layer, both in enumerate(cache._layers):
        assert both is not None
        for ours, theirs in zip(engine.cached(layer), both, strict=True):
            assert relative(ours, theirs[0, :, : len(ids)]) <= 1e-3


def cut(engine: Engine, ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Logits of all tokens, computed in chunks of these lengths."""
    found, start = [], 0
    for length in lengths:
        found += list(engine.logits_from(ids[: start + length], start))
        start += length
    assert start == len(ids)
    return torch.cat(found)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", *BITS])
def test_however_a_text_is_cut_the_logits_are_the_same_to_the_bit(
    source: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk, token by token, in uneven chunks, and after rewinding."""
    monkeypatch.setattr(engine_module, "CHUNK", 100)
    monkeypatch.setattr(engine_module, "_LOGITS_PER_CHUNK", 100)
    model, packing, _ = built(source, precision)
    ids = torch.randint(556, (140,), generator=torch.Generator().manual_seed(2)).tolist()
    once = Engine(model, 300, packing).all_logits(ids)
    assert torch.equal(cut(Engine(model, 300, packing), ids, [1] * len(ids)), once)
    assert torch.equal(cut(Engine(model, 300, packing), ids, [3, 1, 90, 2, 17, 27]), once)
    engine = Engine(model, 300, packing)
    other = [*ids[:50], *reversed(ids[50:])]
    engine.all_logits(other)
    assert torch.equal(engine.next_logits(ids[:70]).values, once[69])  # after the first 50
    assert engine.next_logits(ids).reused_tokens == 70
    assert torch.equal(engine.next_logits(ids).values, once[-1])
    assert torch.equal(engine.next_logits(ids[:20]).values, once[19])


def test_room_that_an_interrupted_text_left(source: Path) -> None:
    """An interrupted run can grow only the first layers of the cache. The next text must fit into all layers."""
    model, packing, _ = built(source, "int8")
    ids = list(range(40))
    expected = Engine(model, 2000, packing).next_logits(ids).values
    for before in (0, 3, 300):
        engine = Engine(model, 2000, packing)
        if before:
            engine.next_logits(list(range(before)))

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, model.layers[1].register_forward_hook(interrupt):
            patch.setattr(FusedLayers, "fits", lambda *_: False)  # as before packing
            with pytest.raises(KeyboardInterrupt):
                engine.next_logits([5] * 600)
        assert torch.equal(engine.next_logits(ids).values, expected)


def test_taps_see_the_readable_network(tiny_dir: Path) -> None:
    """A hook that changes nothing gives the same logits up to rounding."""
    llama = Llama.load(tiny_dir, precision="int8", device="cpu")
    llama.prepare()
    plain = llama.logits("the nation")
    seen: list[Tensor] = []

    def look(value: Tensor, *_: object) -> Tensor:
        seen.append(value)
        return value

    tapped = llama.intervened({"layers.1.resid_post": look})
    assert relative(tapped.logits("the nation"), plain) <= BOUNDS["int8"]
    assert seen
    assert tapped.engine._fused is None


# --- Cache ------------------------------------------------------------------------------------


def kept() -> list[Path]:
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "llama-scratch"
    return [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "kernels"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list with one entry per quantized weight."""
    calls: list[int] = []

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return to_panels(*arguments)

    monkeypatch.setattr(packing_module, "to_panels", counted)
    return calls


@PRECISIONS
def test_the_second_start_packs_nothing(source: Path, precision: str, made: list[int]) -> None:
    """It maps the cached file. Another precision has its own file."""
    first = run(built(source, precision)[0])
    (file,) = kept()
    assert len(made) == 13  # four groups of projections in each of three layers, and the output
    model, *_ = built(source, precision)
    assert len(made) == 13
    assert torch.equal(run(model), first)
    size = sum(form.nbytes for form in forms(model) if isinstance(form, Panels)) / 13
    assert file.stat().st_size >= 13 * size / 2  # fused projections count more than once
    built(source, "int4" if precision == "int8" else "int8")
    assert len(kept()) == 2


@PRECISIONS
def test_a_damaged_file_is_made_again(source: Path, precision: str, made: list[int]) -> None:
    """Intact pieces are reused and the others packed again. The next start maps a complete file."""
    first = run(built(source, precision)[0])
    (file,) = kept()
    whole = file.read_bytes()
    for spoiled in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-70] + b"x" * 70, whole[:-1], b""):
        file.write_bytes(spoiled)
        made.clear()
        assert torch.equal(run(built(source, precision)[0]), first)
        assert made
        assert torch.equal(run(built(source, precision)[0]), first)
        assert file.read_bytes() == whole


TEXT = "The nation that has its own heart and hands. " * 200


def calibrated(path: Path) -> Tensor:
    """Logits of the calibrated model with this cache folder, after packing."""
    (text := path.parent / "text.txt").write_text(TEXT)
    llama = Llama.load(path, precision="int4", device="cpu", calibration=text)
    llama.prepare()
    try:
        return llama.logits("the nation")
    finally:
        llama.close()


def kept_last() -> Path:
    """The file of calibrated weights. The file of the int8 network, which reads the examples, is older."""
    return max(kept(), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.slow
def test_of_a_damaged_calibrated_file_one_piece_is_made_again(tmp_path: Path, made: list[int]) -> None:
    """The forward passes run again, but the other pieces are reused, and a complete file is written."""
    path = write_meta(tmp_path / "Tiny")
    first = calibrated(path)
    file = kept_last()
    whole = file.read_bytes()
    for place in (-70, len(whole) // 2):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place:][1:])
        made.clear()
        assert torch.equal(calibrated(path), first)
        assert len(made) == 1
        assert file.read_bytes() == whole
    assert torch.equal(calibrated(path), first)
    assert len(made) == 1


CALIBRATING = """
import os, signal, sys
from pathlib import Path
import torch
from llama_scratch.precision import kernels
from llama_scratch.precision import packing
from tests.precision.test_panels import calibrated
path, finished, library, os.environ["LLAMA_SCRATCH_KERNELS"] = sys.argv[1:]
put, pieces = packing.PackedWeightCache.put, []
def counted(self, i, values, scales):
    put(self, i, values, scales)
    if values.dtype == torch.uint8:
        pieces.append(i)
    if len(pieces) == int(finished):
        os.kill(os.getpid(), signal.SIGKILL)
packing.PackedWeightCache.put = counted
torch.ops.load_library(library)
kernels._loaded = True
calibrated(Path(path))
"""


@pytest.mark.parametrize(
    "finished", [pytest.param(1, marks=pytest.mark.slow), 6, pytest.param(12, marks=pytest.mark.slow)]
)
def test_a_killed_calibration_is_continued(
    tmp_path: Path, finished: int, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only missing pieces are quantized. File and logits are bit-identical to an uninterrupted run."""
    path = write_meta(tmp_path / "Tiny")
    library = next(path for path in torch.ops.loaded_libraries if Path(path).name.startswith("kernels-"))
    arguments = [str(path), str(finished), library, KERNELS]
    done = subprocess.run([sys.executable, "-c", CALIBRATING, *arguments], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    (part,) = (file for file in kept() if file.suffix == ".part")
    answer = calibrated(path)
    assert len(made) == 13 - finished
    assert not part.exists()
    interrupted = kept_last().read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert torch.equal(calibrated(path), answer)
    assert kept_last().read_bytes() == interrupted


@pytest.mark.slow
def test_two_calibrations_at_once(tmp_path: Path, made: list[int]) -> None:
    """The second one quantizes all pieces itself, and only the first one writes the cache."""
    path = write_meta(tmp_path / "Tiny")
    expected: list[Tensor] = []
    threads = [threading.Thread(target=lambda: expected.append(calibrated(path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(*expected)
    made.clear()
    assert torch.equal(calibrated(path), expected[0])
    assert not made


def test_a_failed_piece_is_not_taken_for_another(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error in one thread, another thread that continues must not use or cache a piece at a wrong index."""
    args, weights = tiny_args(), stored(tiny_args())
    calls: list[int] = []

    def fails(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 16:  # 13 of int8, which reads the examples, and two of int4
            time.sleep(0.5)  # until the other thread is waiting
            raise MemoryError
        return to_panels(*arguments)

    threads = torch.get_num_threads()
    examples = CalibrationText("some", lambda _: [torch.arange(40)[None]])
    with monkeypatch.context() as patch:
        patch.setattr(packing_module, "to_panels", fails)
        torch.set_num_threads(2)
        model, packing = build(weights, args, "int4", CPU, [source], examples)
        torch.set_num_threads(threads)
        packing.start()
        until(lambda: not packing.running)
        assert isinstance(packing.error, MemoryError)
        assert relative(run(model), reference(weights)) <= BOUNDS["int4"]
    again, packing = build(weights, args, "int4", CPU, [source], examples)
    packing.wait()
    alone, packing = build(weights, args, "int4", CPU, [], examples)
    packing.wait()
    assert torch.equal(run(again), run(alone))


@pytest.mark.slow
def test_what_is_calibrated_with_another_network_is_another_file(tmp_path: Path) -> None:
    path = write_meta(tmp_path / "Tiny")
    (text := tmp_path / "text.txt").write_text("The nation that has its own heart and hands. " * 200)
    for factor in (8, 32):
        llama = Llama.load(path, precision="int4", device="cpu", calibration=text, rope_factor=factor)
        llama.prepare()
        llama.close()
    assert len(kept()) == 3  # the int8 file, for reading the examples, depends only on the weights


@PRECISIONS
def test_without_kernels_the_kept_panels_are_multiplied(
    source: Path, precision: str, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's operators, and then again by the kernels."""
    in_panels = run(built(source, precision)[0])
    with pytest.MonkeyPatch.context() as patch:
        without_kernels(patch)
        model, *_ = built(source, precision)
        assert {type(form) for form in forms(model)} == {Panels}
        rows = run(model)
    assert 0 < relative(rows, in_panels) <= BOUNDS["int8"]
    assert torch.equal(run(built(source, precision)[0]), in_panels)
    assert len(kept()) == 1
    assert len(made) == 13


# --- Errors -----------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["norm", "layers.1.feed_forward.w2", "layers.0.attention.wk", "output"])
def test_damaged_weights_are_an_error(source: Path, precision: str, value: float, name: str) -> None:
    """The same before and after packing, and in the next run."""
    weights = stored(tiny_args(), tied=False)
    weights[f"{name}.weight"].view(-1)[7] = value
    for _ in range(2):
        model, packing = build(weights, tiny_args(), precision, CPU, [source])
        for _ in range(2):
            with pytest.raises(CheckpointError, match="NaN or infinity, so its weights are damaged"):
                Engine(model, 100, packing).next_logits([0, 1, 2])
            packing.wait()


@PRECISIONS
def test_weights_beyond_a_scale_stay_what_they_are(source: Path, precision: str) -> None:
    """Weights beyond the range of float16 scales are multiplied in the file's format, all others in panels."""
    args = tiny_args(n_layers=1)
    weights = stored(args, torch.float32, tied=False)
    weights["layers.0.feed_forward.w2.weight"][3, 5] = 1e8
    model, *_ = built(source, precision, args, weights)
    assert [type(form) for form in forms(model)].count(Rows) == 1
    assert torch.isfinite(run(model)).all()


@PRECISIONS
def test_answers_come_where_nothing_can_be_compiled(
    source: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the compiler fails, panels are multiplied in float32, which is closer to fp32."""
    monkeypatch.setattr(kernels, "_loaded", False)
    monkeypatch.setattr(kernels, "load", lambda: False)
    monkeypatch.setattr(kernels, "build", lambda: False)
    assert kernels.possible()
    model, packing, weights = built(source, precision)
    assert {type(form) for form in forms(model)} == {Panels}
    assert relative(run(model), reference(weights)) <= BOUNDS[precision]
    ids = list(range(30))
    assert torch.allclose(Engine(model, 100, packing).all_logits(ids), run(model, torch.tensor([ids])), atol=1e-4)


@PRECISIONS
def test_an_interrupt_while_it_packs_leaves_what_is_packed(source: Path, precision: str) -> None:
    """The session continues, the next answer packs the rest, and no incomplete file remains."""
    args = tiny_args()
    weights = stored(args)
    model, packing = build(weights, args, precision, CPU, [source])

    def interrupt(_stage: str, done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packing.wait(interrupt)
    assert relative(run(model), reference(weights)) <= BOUNDS[precision]
    packing.wait()
    expected = run(model)
    assert torch.equal(run(built(source, precision)[0]), expected)


@PRECISIONS
def test_a_whole_model(tmp_path: Path, precision: str) -> None:
    """From a model's files to generated text, and bit-identical from the cache."""
    path = write_meta(tmp_path / "Tiny")
    text = tmp_path / "text.txt"
    text.write_text("The nation that has its own heart and hands. " * 200)
    exact = Llama.load(path, precision="fp32", device="cpu").logits("the nation")
    answers = []
    for _ in range(2):
        llama = Llama.load(path, precision=precision, device="cpu", calibration=text)
        llama.prepare()
        assert llama.predict("the nation").model.precision == precision
        answers.append(llama.logits("the nation"))
        assert relative(answers[-1], exact) <= 2 * BOUNDS[precision]  # sharper attention amplifies the error
        assert len(list(llama.generate("the nation", 8))) == 8
        llama.close()
    assert torch.equal(*answers)


@pytest.mark.slow
def test_a_calibrated_network_is_nearer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closer to fp32 on another text of the same kind."""
    path = write_meta(tmp_path / "Tiny")
    drawn = random.Random(0)
    words = ["the", "nation", "that", "has", "its", "own", "heart", "and", "hands"]
    text, other = (" ".join(drawn.choices(words, k=count)) for count in (9000, 60))
    (file := tmp_path / "text.txt").write_text(text)
    exact = Llama.load(path, precision="fp32", device="cpu").logits(other)
    distances = []
    for text_of in (lambda *_: None, calibration_text):
        monkeypatch.setattr(loading, "calibration_text", text_of)
        llama = Llama.load(path, precision="int4", device="cpu", calibration=file)
        llama.prepare()
        distances.append(relative(llama.logits(other), exact))
        llama.close()
    assert distances[1] < 0.8 * distances[0], distances


def test_a_calibration_that_does_not_fit_is_refused(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer raises the error. The model itself fits into memory."""
    monkeypatch.setattr(memory, "memory_limit", lambda: memory.MemoryLimit(500_000_000))
    monkeypatch.setattr(memory_estimate, "_HESSIAN_BYTES", 1 << 16)
    llama = Llama.load(tiny_dir, precision="int4", device="cpu")
    said = r"^Calibrating int4 needs \d+\.\d GB of memory \(.*Hessian [^)]*\), but only 0\.5 GB are free\. "
    llama.prepare(wait=False)
    until(lambda: llama.engine.packing.error is not None)
    for ask in (lambda: llama.predict("the nation"), llama.prepare):
        with pytest.raises(OutOfMemoryError, match=said):
            ask()
    llama.close()


def test_a_calibration_ends_with_the_model(tiny_dir: Path) -> None:
    """At any stage, and progress names the stage."""
    llama = Llama.load(tiny_dir, precision="int4", device="cpu")
    llama.prepare(wait=False)
    until(lambda: llama.preparing is not None and llama.preparing[0] in ("sampling", "calibrating"))
    start = time.monotonic()
    llama.close()
    assert time.monotonic() - start < 5
    assert not llama.engine.packing.done
    assert len(kept()) <= 1  # the int8 file, for reading the examples


@PRECISIONS
@pytest.mark.parametrize("sizes", [{}, {"dim": 40, "multiple_of": 6, "vocab_size": 555}])
def test_the_weights_that_are_predicted_are_those_that_lie_in_panels(
    source: Path, precision: str, sizes: dict[str, int]
) -> None:
    """Padding is estimated per weight, but applied to stacked weights."""
    args = tiny_args(**sizes)
    model, *_ = built(source, precision, args)
    stacks = {id(form): form for form in forms(model) if isinstance(form, Panels)}.values()
    taken = sum(form.nbytes for form in stacks)
    predicted = memory_needed(args, precision, torch.bfloat16, 512, CPU, tied=True)["weights"]
    assert predicted == taken if not sizes else taken <= predicted <= 1.1 * taken
