"""Each precision against fp32 for a whole network, with and without kernels, and the choice of precision."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llama_scratch.errors import CheckpointError, UsageError
from llama_scratch.inference.engine import Engine
from llama_scratch.llama import Llama
from llama_scratch.model import Transformer
from llama_scratch.precision import ACTIVATIONS, PRECISIONS, resolve_precision, validate_precision
from llama_scratch.precision import packing as packing_module
from llama_scratch.precision.dtypes import activation_type, all_known, file_type
from llama_scratch.precision.lazy_weight import GGUFBlockWeight, Weight, as_tensor
from llama_scratch.precision.linear import Differentiable, FusedLinearPart, format_of, weight_bytes
from llama_scratch.precision.network import build, differentiable
from llama_scratch.precision.panels import Panels, to_panels
from llama_scratch.precision.rows import Rows
from llama_scratch.system.memory import trim_heap
from tests.helpers import KERNELS
from tests.helpers.checkpoints import TINY_PARAMS, random_weights, tiny_args, write_meta
from tests.helpers.networks import CPU, CUDA, IDS, MPS, forms, reference, relative, run, stored
from tests.trust.memory import anonymous


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the kernels, unless a test enables them."""
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", "0")


@pytest.fixture(params=[False, True], ids=["torch", "kernels"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _without_kernels: None) -> bool:
    """Whether products are computed by the kernels or torch's operators."""
    if request.param:
        request.getfixturevalue("built_kernels")
        monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", KERNELS)
    return bool(request.param)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def weights(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return stored(tiny_args(), tied=request.param)


def rows(model: Transformer) -> Iterator[Rows]:
    for form in forms(model):
        assert isinstance(form, Rows)
        yield form


# --- Accuracy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 1e-5), ("fp16", 1e-3), ("int8", 0.03)])
def test_a_precision_keeps_its_promise_from_the_first_answer_on(
    weights: dict[str, Tensor], source: Path, kernels: bool, precision: str, bound: float
) -> None:
    """With an engine, which waits for packed weights; the bare network is as accurate."""
    model, packing = build(weights, tiny_args(), precision, CPU, [source])
    expected = reference(weights)
    engine = Engine(model, 100, packing)
    first = engine.all_logits(IDS[0].tolist())
    assert relative(first, expected) <= bound
    assert relative(run(model), expected) <= bound
    assert packing.done


def test_fp16_rounds_float32_weights_to_within_1e_3(source: Path, kernels: bool) -> None:
    """Unlike bfloat16, float32 weights are rounded to float16, but the accuracy is still within bounds."""
    weights = stored(tiny_args(), torch.float32)
    model, _ = build(weights, tiny_args(), "fp16", CPU, [source])
    assert 1e-5 < relative(run(model), reference(weights)) <= 1e-3


def quantized_by_torch(weights: dict[str, Tensor]) -> Transformer:
    """8 bits as in torch's dynamic quantization: one scale per weight and one for all activations."""

    class Naive(nn.Module):
        def __init__(self, weight: Tensor):
            super().__init__()
            self.weight = self.rounded(weight)

        @staticmethod
        def rounded(x: Tensor) -> Tensor:
            scale = x.abs().max() / 127
            return (x / scale).round() * scale

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.rounded(x), self.weight)

    model = Transformer(tiny_args())
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linears:
        model.set_submodule(name, Naive(module.weight.detach()))
    return model


def test_int8_is_much_closer_than_one_scale_for_all(source: Path) -> None:
    """Activations with outliers, as in a trained network: some norm weights are 50 times as large as others."""
    weights = stored(tiny_args())
    for name, weight in weights.items():
        if name.endswith("_norm.weight"):
            weight[7] *= 50
    expected = reference(weights)
    model, packing = build(weights, tiny_args(), "int8", CPU, [source])
    packing.wait()
    ours, naive = relative(run(model), expected), relative(run(quantized_by_torch(weights)), expected)
    assert ours <= 0.05
    assert ours < naive / 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_answer_as_32_of_the_same_file(source: Path, kernels: bool, precision: str) -> None:
    """Only the order of summation differs: both dtypes contain the weights exactly, and activations are float32."""
    weights = stored(tiny_args(), torch.bfloat16 if precision == "bf16" else torch.float16)
    first, second = (build(weights, tiny_args(), name, CPU, [source])[0] for name in (precision, "fp32"))
    assert relative(run(first), run(second)) <= 1e-5
    assert first.norm.weight.dtype == first.tok_embeddings.dtype == torch.float32


def test_activations_in_bf16_are_rounded_between_the_layers(source: Path, kernels: bool) -> None:
    """Each projection agrees with torch's bfloat16 layer, except for the order of summation."""
    weights = stored(tiny_args())
    model, packing = build(weights, tiny_args(), "bf16", CPU, [source], activations="bf16")
    assert packing.done or kernels
    metas = Transformer(tiny_args())
    metas.load_state_dict(weights, assign=True)
    x = torch.randn(1, 48, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in ("layers.0.attention.wq", "layers.1.attention.wv", "layers.2.feed_forward.w3", "output"):
        with torch.inference_mode():
            ours, theirs = model.get_submodule(name)(x), metas.get_submodule(name)(x)
        assert ours.dtype == torch.bfloat16
        assert (ours == theirs).double().mean() > 0.99
        assert relative(ours, theirs) < 1e-3
    seen: set[torch.dtype] = set()
    for module in model.modules():
        module.register_forward_hook(lambda *args: seen.add(args[-1].dtype) if isinstance(args[-1], Tensor) else None)
    logits = run(model)
    assert seen == {torch.bfloat16, torch.float32}  # only the logits are float32
    assert 1e-4 < relative(logits, reference(weights)) <= 0.05
    assert relative(logits, run(metas)) <= 0.05


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activations_are_chosen_apart_from_the_weights(source: Path, precision: str) -> None:
    """With bfloat16, the cache has half the size, and logits are off by that dtype's rounding."""
    weights = stored(tiny_args(n_layers=1))
    expected = reference(weights, tiny_args(n_layers=1))
    found = {}
    for activations in ("auto", *ACTIVATIONS):
        model, packing = build(weights, tiny_args(n_layers=1), precision, CPU, [source], activations=activations)
        engine = Engine(model, 100, packing)
        found[activations] = engine.all_logits(IDS[0].tolist()), engine.cached(0)[0].dtype
    assert torch.equal(found["auto"][0], found["fp32"][0])
    assert [found[name][1] for name in ("auto", "fp32", "bf16")] == [torch.float32, torch.float32, torch.bfloat16]
    assert relative(found["bf16"][0], found["fp32"][0]) > 1e-4
    assert relative(found["bf16"][0], expected) <= (0.4 if precision == "int4" else 0.1)


# --- Memory -----------------------------------------------------------------------------------


TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize(("precision", "dtype"), TYPES.items())
def test_weights_of_the_type_are_those_of_the_file(
    weights: dict[str, Tensor], source: Path, kernels: bool, precision: str, dtype: torch.dtype
) -> None:
    """Nothing is packed or copied, and one token reads each weight once."""
    held = {name: weight.to(dtype) for name, weight in weights.items()}
    if weights["output.weight"] is weights["tok_embeddings.weight"]:
        held["output.weight"] = held["tok_embeddings.weight"]
    model, packing = build(held, tiny_args(), precision, CPU, [source])
    assert packing.done
    own = {weight.data_ptr() for name, weight in held.items() if weight.ndim == 2}
    assert len(forms(model)) == 3 * 4 + 1
    used = [as_tensor(weight) for form in rows(model) for weight in form.weights]
    assert {weight.dtype for weight in used} == {dtype}
    assert {weight.data_ptr() for weight in used} | {model.tok_embeddings.weight.data_ptr()} == own
    matrices = [weight for name, weight in held.items() if weight.ndim == 2 and "tok_" not in name]
    assert weight_bytes(model) == dtype.itemsize * sum(weight.numel() for weight in matrices)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp16_converts_each_weight_once(weights: dict[str, Tensor], source: Path, dtype: torch.dtype) -> None:
    """At construction. A tied pair stays tied, and the file's own tensors are unchanged."""
    held = {name: weight.to(dtype) for name, weight in weights.items()}
    if tied := weights["output.weight"] is weights["tok_embeddings.weight"]:
        held["output.weight"] = held["tok_embeddings.weight"]
    before = {name: weight.clone() for name, weight in held.items()}
    model, packing = build(held, tiny_args(), "fp16", CPU, [source])
    assert packing.done
    converted = [as_tensor(weight) for form in rows(model) for weight in form.weights]
    assert {weight.dtype for weight in converted} == {torch.float16}
    assert model.tok_embeddings.weight.dtype == torch.float16
    assert (converted[-1].data_ptr() == model.tok_embeddings.weight.data_ptr()) is tied
    run(model)
    again = [as_tensor(weight) for form in rows(model) for weight in form.weights]
    assert [weight.data_ptr() for weight in again] == [weight.data_ptr() for weight in converted]
    assert all(torch.equal(weight, before[name]) and weight.dtype == dtype for name, weight in held.items())


def test_8_bits_are_packed_beside_the_files_weights(source: Path, kernels: bool) -> None:
    """The embedding stays in the file's format. A token reads one byte per weight, plus 2 bytes per 32 weights."""
    weights = stored(tiny_args(), torch.float32)
    before = {name: weight.clone() for name, weight in weights.items()}
    model, packing = build(weights, tiny_args(), "int8", CPU, [source])
    assert {type(form) for form in forms(model)} == {Rows}
    assert not packing.done
    packing.wait()
    assert {type(form) for form in forms(model)} == {Panels}
    assert model.tok_embeddings.weight.data_ptr() == weights["tok_embeddings.weight"].data_ptr()
    shapes = [weight.shape for name, weight in weights.items() if weight.ndim == 2 and "tok_" not in name]
    whole = sum(-(-out // 16) * 16 * width for out, width in shapes)  # rows are padded to whole panels
    assert weight_bytes(model) == whole + whole // 32 * 2
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_bf16_takes_little_memory_of_its_own(tmp_path: Path, kernels: bool) -> None:
    """For a file of 61 MB. torch's operators convert blocks of it to float32."""
    shape = TINY_PARAMS | {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4}
    path = write_meta(tmp_path / "Llama", params=shape)
    Llama.load(path, precision="bf16", device="cpu", context=256).predict([1] * 8)  # starts its threads
    trim_heap()
    before = anonymous()
    llama = Llama.load(path, precision="bf16", device="cpu", context=256)
    list(llama.generate([1] * 100, 4))
    assert llama.weight_bytes > 55e6
    assert anonymous() - before < (10e6 if kernels else 30e6)


# --- GGUF's blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_quantized_blocks_are_read_as_they_lie(
    smollm2_path: Path, smollm2_fp32_path: Path, kernels: bool, precision: str
) -> None:
    """A token reads the file's bytes, and the logits match the same weights in a float32 file.

    Without kernels that would be slow, so the blocks of a small model are converted to fp16.
    """
    ids = [1, 504, 3575, 282, 4649, 314]
    expected = Llama.load(smollm2_fp32_path, precision="fp32", device="cpu", context=64).logits(ids)
    trim_heap()
    before = anonymous()
    llama = Llama.load(smollm2_path, precision=precision, device="cpu", context=64)
    assert llama.info.precision == ("fp16" if precision == "auto" else "fp32")
    assert llama.engine.packing.done
    found = llama.logits(ids)
    used = [weight for form in rows(llama.engine.model) for weight in form.weights]
    matrices = llama.info.parameters - 61 * 576
    if kernels:
        assert all(isinstance(weight, GGUFBlockWeight) for weight in used)
        assert 0.95 * smollm2_path.stat().st_size < llama.weight_bytes < smollm2_path.stat().st_size
        assert anonymous() - before < matrices  # half the size of float16
        assert relative(found, expected) <= 1e-5
    else:
        dtype = TYPES[llama.info.precision]
        assert {weight.dtype for weight in used} == {dtype}
        assert llama.weight_bytes == dtype.itemsize * matrices
        assert relative(found, expected) <= (1e-3 if precision == "auto" else 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_blocks_that_no_kernel_knows_are_converted(source: Path, kernels: bool, precision: str) -> None:
    """One matrix in Q2_K among others in Q8_0, which are not converted if there are kernels."""
    args = tiny_args(n_layers=1)
    weights: dict[str, Weight] = dict(stored(args, torch.float32))
    plain = as_tensors(weights)
    for name, format in (("wo", "Q2_K"), ("wq", "Q8_0")):
        whole = plain[f"layers.0.attention.{name}.weight"] = torch.randn(256, 256).clamp(-1, 1).mul(127).round() / 2048
        blocks = q8_0(whole) if format == "Q8_0" else torch.zeros(256, 84, dtype=torch.uint8)
        turn = partial(lambda whole, start, stop: whole[start:stop], whole)
        weights[f"layers.0.attention.{name}.weight"] = GGUFBlockWeight((256, 256), blocks, format, turn)
    assert file_type(weights) is None
    assert not all_known(weights)
    model, _ = build(weights, args, precision, CPU, [source])
    wo, wq = (format_of(model.layers[0].get_submodule(f"attention.{name}")) for name in ("wo", "wq"))
    assert isinstance(wo, Rows)
    assert isinstance(wq, Rows)
    assert wo.weights[0].dtype == TYPES[precision]
    assert isinstance(wq.weights[0], GGUFBlockWeight) is kernels
    assert relative(run(model), reference(plain, args)) <= (1e-5 if precision == "fp32" else 1e-3)


def as_tensors(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    return {name: as_tensor(weight) for name, weight in weights.items()}


def q8_0(weight: Tensor) -> Tensor:
    """Multiples of 1/2048, in blocks of a scale and 32 integers."""
    numbers = (weight * 2048).round().to(torch.int8).view(len(weight), -1, 32)
    scales = torch.full((*numbers.shape[:2], 1), 1 / 2048, dtype=torch.float16).view(torch.int8)
    return torch.cat([scales, numbers], dim=-1).flatten(1).view(torch.uint8)


# --- Weights beyond the range of float16 ------------------------------------------------------


@pytest.mark.parametrize("value", [1e6, -1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_beyond_float16_stay_what_they_are(
    source: Path, kernels: bool, dtype: torch.dtype, value: float
) -> None:
    """fp16 multiplies such a matrix in the file's dtype, and the others in float16."""
    args = tiny_args(n_layers=1)
    weights = {name: weight.to(dtype) for name, weight in stored(args, tied=False).items()}
    beyond = weights["layers.0.attention.wo.weight"]
    beyond[3, 5] = value
    before = beyond.clone()
    model, _ = build(weights, args, "fp16", CPU, [source])
    assert torch.equal(beyond, before)
    form = format_of(model.layers[0].get_submodule("attention.wo"))
    assert isinstance(form, Rows)
    assert as_tensor(form.weights[0]).data_ptr() == beyond.data_ptr()
    assert [as_tensor(weight).dtype for form in rows(model) for weight in form.weights].count(torch.float16) == 7
    assert relative(run(model), reference(weights, args)) <= 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize(
    "name",
    [
        "norm.weight",
        "tok_embeddings.weight",
        "layers.1.feed_forward.w2.weight",
        "layers.0.attention.wk.weight",
        "output.weight",
    ],
)
def test_damaged_weights_are_an_error_in_every_form(source: Path, precision: str, value: float, name: str) -> None:
    """A single NaN makes every answer an error, the first one and the next."""
    weights = stored(tiny_args(), tied=False)
    weights[name].view(-1)[7] = value
    model, packing = build(weights, tiny_args(), precision, CPU, [source])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="NaN or infinity, so its weights are damaged"):
            Engine(model, 100, packing).next_logits([0, 1, 2])


# --- During packing ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_first_answer_comes_from_packed_weights(source: Path, kernels: bool, precision: str) -> None:
    """It is bit-identical to later ones, also in the next run, which maps the cached weights."""
    weights, ids = stored(tiny_args(n_layers=1)), IDS[0].tolist()
    answers = []
    for _ in range(2):
        model, packing = build(weights, tiny_args(n_layers=1), precision, CPU, [source])
        answers.append(Engine(model, 100, packing).all_logits(ids))
        packing.wait()
        answers.append(Engine(model, 100, packing).all_logits(ids))
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    distance = relative(answers[0], reference(weights, tiny_args(n_layers=1)))
    assert 1e-4 < distance <= (0.03 if precision == "int8" else 0.3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_every_answer_names_the_precision_that_was_asked_for(tiny_dir: Path, precision: str) -> None:
    """The first answer and those after `prepare`, which are identical."""
    llama = Llama.load(tiny_dir, precision=precision, device="cpu")
    first = llama.predict("the nation")
    assert first.model.precision == llama.info.precision == precision
    llama.prepare()
    again = llama.predict("the nation")
    assert again.model == first.model
    assert again.next.logprob == pytest.approx(first.next.logprob, abs=1e-5)


def test_an_interrupted_wait_leaves_the_next_answer_right(
    source: Path, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during the wait of the first answer: packing continues, and the next answer waits again."""
    weights, ids = stored(tiny_args(n_layers=1)), IDS[0].tolist()
    begin, pack = threading.Event(), to_panels
    monkeypatch.setattr(packing_module, "to_panels", lambda *args: begin.wait(10) and pack(*args))
    model, packing = build(weights, tiny_args(n_layers=1), "int8", CPU, [source])
    engine = Engine(model, 100, packing)
    seen: list[tuple[str, int, int]] = []

    def interrupt(*report: object) -> None:
        seen.append(report)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.next_logits(ids, interrupt)
    total = sum(weight.numel() for name, weight in weights.items() if weight.ndim == 2 and "tok_" not in name)
    assert set(seen) == {("packing", 0, total)}
    begin.set()
    assert engine.next_logits(ids, lambda *report: seen.append(report)).reused_tokens == 0
    assert {(stage, total) for stage, _, total in seen} == {("packing", total)}
    model, packing = build(weights, tiny_args(n_layers=1), "int8", CPU, [source])
    assert torch.equal(engine.all_logits(ids), Engine(model, 100, packing).all_logits(ids))


def test_an_interruption_between_the_projections_leaves_the_next_answer_right(source: Path) -> None:
    """Ctrl-C after wq was computed together with wk and wv; then the same prompt and another one."""
    weights = stored(tiny_args())
    model, _ = build(weights, tiny_args(), "bf16", CPU, [source])
    expected, other = reference(weights), IDS.flip(1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for layer in model.layers:
        for name in ("attention.wk", "attention.wv", "feed_forward.w3"):
            with layer.get_submodule(name).register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
                run(model, other)
            assert relative(run(model), expected) <= 1e-5
    shared = [module for module in model.modules() if isinstance(module, FusedLinearPart)]
    assert shared
    assert all(module.fused._input is None for module in shared)


# --- Choice of precision ----------------------------------------------------------------------

FILES = [torch.bfloat16, torch.float16, torch.float32, None]


@pytest.mark.parametrize("stored", FILES, ids=str)
@pytest.mark.parametrize("asked", PRECISIONS)
def test_a_precision_that_is_named_is_taken(asked: str, stored: torch.dtype | None) -> None:
    """On every device."""
    validate_precision(asked)
    for device in (CPU, CUDA, MPS, None):
        assert resolve_precision(asked, stored, device) == asked


@pytest.mark.parametrize(
    ("device", "able", "expected"),
    [
        (CPU, False, ["bf16", "fp16", "fp32", "fp16"]),
        (None, False, ["bf16", "fp16", "fp32", "fp16"]),
        (CUDA, True, ["bf16", "fp16", "fp32", "fp16"]),
        (CUDA, False, ["fp32", "fp16", "fp32", "fp16"]),
        (MPS, True, ["bf16", "fp16", "fp32", "fp16"]),
        (MPS, False, ["fp32", "fp16", "fp32", "fp16"]),
    ],
)
def test_auto_is_the_files_own_type(
    monkeypatch: pytest.MonkeyPatch, device: torch.device | None, able: bool, expected: list[str]
) -> None:
    """`able`: whether the GPU supports bfloat16. A CPU supports all dtypes."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: able)
    monkeypatch.setattr("torch.backends.mps.is_macos_or_newer", lambda *_: able)
    assert [resolve_precision("auto", stored, device) for stored in FILES] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_type_of_a_file_is_that_of_its_matrices(dtype: torch.dtype) -> None:
    """float32 norms do not change it; one matrix in quantized blocks does."""
    weights = {name: w if w.ndim == 1 else w.to(dtype) for name, w in random_weights(tiny_args()).items()}
    assert file_type(weights) == dtype
    blocks = GGUFBlockWeight(
        (256, 256), torch.zeros(256, 272, dtype=torch.uint8), "Q8_0", lambda *_: torch.zeros(1, 256)
    )
    assert file_type({**weights, "layers.1.attention.wq.weight": blocks}) is None


@pytest.mark.parametrize("name", ["fp8", "", "FP16", "int2"])
def test_another_name_is_a_usage_error(name: str) -> None:
    """The error lists the valid names."""
    validate_precision("auto")
    with pytest.raises(UsageError) as caught:
        validate_precision(name)
    expected = "expected one of auto, fp32, bf16, fp16, int8, int4 (`precision`)."
    assert str(caught.value) == f"The precision is {name!r}, {expected}"


@pytest.mark.parametrize("name", ["fp16", "", "BF16", "int8"])
def test_other_activations_are_a_usage_error(tiny_dir: Path, name: str) -> None:
    """The error is raised before anything is loaded."""
    with pytest.raises(UsageError) as caught:
        Llama.load(tiny_dir, activations=name, device="cpu")
    assert str(caught.value) == f"The activations are {name!r}, expected one of auto, fp32, bf16 (`activations`)."


@pytest.mark.parametrize("able", [True, False])
def test_activations_by_default(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    """float32 on a CPU for any weights. On a GPU, the dtype of the weights, or bfloat16 for quantized ones."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: able)
    assert {activation_type("auto", precision, CPU) for precision in PRECISIONS} == {torch.float32}
    found = {precision: activation_type("auto", precision, CUDA) for precision in PRECISIONS}
    few = torch.bfloat16 if able else torch.float32
    assert found == TYPES | {"int8": few, "int4": few}
    for device in (CPU, CUDA):
        assert {activation_type("bf16", precision, device) for precision in PRECISIONS} == {torch.bfloat16}
        assert {activation_type("fp32", precision, device) for precision in PRECISIONS} == {torch.float32}


# --- Gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_differentiable_network_is_the_reference_with_gradients(
    weights: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Gradients of logits with respect to token embeddings agree with torch's layers; weights are not copied."""
    held = {name: weight.to(dtype) for name, weight in weights.items()}
    if weights["output.weight"] is weights["tok_embeddings.weight"]:
        held["output.weight"] = held["tok_embeddings.weight"]
    before = {name: weight.clone() for name, weight in held.items()}
    model = differentiable(held, tiny_args())
    plain = Transformer(tiny_args())
    plain.load_state_dict({name: weight.float() for name, weight in held.items()}, assign=True)
    plain.eval().requires_grad_(False)
    gradients = []
    for network in (model, plain):
        vectors: list[Tensor] = []

        def begin(_module: nn.Module, _args: object, out: Tensor, vectors: list[Tensor] = vectors) -> Tensor:
            vectors.append(out.detach().requires_grad_())
            return vectors[0]

        handle = network.tok_embeddings.register_forward_hook(begin)
        with torch.enable_grad():
            logits = network(IDS[:, :12])
            (gradient,) = torch.autograd.grad(logits[0, -1, 7], vectors[0])
        handle.remove()
        gradients.append(gradient)
        assert logits.dtype == gradient.dtype == torch.float32
    assert relative(gradients[0], gradients[1]) <= 1e-5
    assert relative(run(model), run(plain)) <= 1e-5
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # Large weights share the file's memory, and the file's tensors are unchanged.
    for name, module in model.named_modules():
        if isinstance(module, Differentiable):
            assert module.weight.data_ptr() == held[f"{name}.weight"].data_ptr()
    assert model.tok_embeddings.weight.data_ptr() == held["tok_embeddings.weight"].data_ptr()
    assert all(torch.equal(weight, before[name]) and weight.dtype == dtype for name, weight in held.items())
