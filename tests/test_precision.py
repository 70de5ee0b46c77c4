"""Each precision against fp32 on a whole network: before, while and after it is packed; and which one is chosen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llama_scratch import precision as precision_module
from llama_scratch.background import Background
from llama_scratch.config import PRECISIONS, ModelArgs
from llama_scratch.engine import Engine
from llama_scratch.errors import CheckpointError, UsageError
from llama_scratch.lazy import as_tensor
from llama_scratch.linear import (
    Blocks,
    Columns,
    Differentiable,
    Half,
    Int8,
    Projection,
    SharedProjection,
    packs,
    weight_bytes,
)
from llama_scratch.llama import Llama
from llama_scratch.model import Transformer
from llama_scratch.precision import build, check_name, choose, differentiable
from tests.checkpoints import random_weights, tiny_args, write_meta

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
needs_fbgemm = pytest.mark.skipif(not packs(), reason="this machine has no fbgemm (x86 with AVX2)")
IDS = torch.randint(556, (1, 48), generator=torch.Generator().manual_seed(0))

# Weights of a group and of a piece: small ones make as many jobs of the tiny network as of a large one.
LIMITS = {"as it is": (1 << 23, 1 << 24), "no groups": (0, 1 << 24), "pieces": (0, 10_000), "small pieces": (0, 3000)}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def weights(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return stored(tiny_args(), tied=request.param)


def stored(args: ModelArgs, dtype: torch.dtype = torch.bfloat16, *, tied: bool = True) -> dict[str, Tensor]:
    """Random weights as a file would hold them; a tied output is the embedding itself."""
    weights = random_weights(args, tied=False)
    held = {
        name: (weight if "wq" not in name and "wk" not in name else weight / 3).to(dtype)
        for name, weight in weights.items()
    }
    return held | {"output.weight": held["tok_embeddings.weight"]} if tied else held


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The file that quantised weights are kept for."""
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


def run(model: Transformer, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(ids, all_positions=True)[0]
        return logits


def reference(weights: dict[str, Tensor], args: ModelArgs | None = None) -> Tensor:
    """What torch's own layers say in float32."""
    model = Transformer(args or tiny_args())
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return run(model)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def projections(model: Transformer) -> Iterator[Projection | SharedProjection]:
    yield from (module for module in model.modules() if isinstance(module, Projection | SharedProjection))


def forms(model: Transformer) -> Iterator[object]:
    for module in projections(model):
        yield from (module.stack if isinstance(module, Projection) else module.shared.stack).forms


# --- The promises -----------------------------------------------------------------------------


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize(("precision", "bound"), [("fp16", 1e-5), ("int8", 0.03)])
def test_a_packed_network_keeps_its_promise(
    weights: dict[str, Tensor],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    bound: float,
    limits: tuple[int, int],
) -> None:
    """Before it is packed it is fp32, afterwards within its bound; in pieces of any size it says the same."""
    monkeypatch.setattr(precision_module, "_FUSED", limits[0])
    monkeypatch.setattr(precision_module, "_PIECE", limits[1])
    model, packing = build(weights, tiny_args(), precision, CPU, [source])
    expected = reference(weights)
    assert relative(run(model), expected) <= 5e-6
    packing.wait()
    assert relative(run(model), expected) <= bound


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_pieces_and_groups_change_no_answer(source: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """A row's product is the same whatever it is packed with; how many there are is seen, too."""
    weights = stored(tiny_args())
    answers, counts = [], []
    for fused, piece in LIMITS.values():
        monkeypatch.setattr(precision_module, "_FUSED", fused)
        monkeypatch.setattr(precision_module, "_PIECE", piece)
        model, packing = build(weights, tiny_args(), precision, CPU, [source])
        counts.append(len(packing._jobs))
        packing.wait()
        answers.append(run(model))
    for answer in answers[1:]:
        assert relative(answer, answers[0]) <= 1e-5
    # Four groups a layer and the output; seven projections a layer; and then pieces of these.
    assert counts[:2] == [3 * 4 + 1, 3 * 7 + 1]
    assert counts[1] < counts[2] < counts[3]


@needs_fbgemm
@pytest.mark.parametrize(("precision", "expected"), [("fp16", {Half}), ("int8", {Int8, Columns})])
def test_packing_exchanges_every_layer(
    source: Path, monkeypatch: pytest.MonkeyPatch, precision: str, expected: set[type]
) -> None:
    """No layer still multiplies the file's weights; one token reads 2 bytes per weight, or 1."""
    monkeypatch.setattr(precision_module, "_fbgemm_block", lambda _: 16)  # four blocks of columns in the tiny output
    weights = stored(tiny_args())
    model, packing = build(weights, tiny_args(), precision, CPU, [source])
    assert {type(held) for held in forms(model)} == {Blocks}
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    linear = sum(weight.numel() for name, weight in weights.items() if weight.ndim == 2 and "tok_" not in name)
    assert weight_bytes(model) == 2 * linear
    packing.wait()
    assert {type(held) for held in forms(model)} == expected
    rows = sum(len(weight) for name, weight in weights.items() if weight.ndim == 2 and "tok_" not in name)
    rows += 3 * len(weights["output.weight"])  # a scale per row for each of four groups of columns
    assert weight_bytes(model) == (2 * linear if precision == "fp16" else linear + 4 * rows)


@needs_fbgemm
def test_fp16_rounds_float32_weights_to_within_1e_3(source: Path) -> None:
    """They do not fit into float16 as bfloat16 ones do, and still the promise holds."""
    weights = stored(tiny_args(), torch.float32)
    model, packing = build(weights, tiny_args(), "fp16", CPU, [source])
    packing.wait()
    assert 1e-5 < relative(run(model), reference(weights)) <= 1e-3


def quantised_by_torch(weights: dict[str, Tensor]) -> Transformer:
    """8 bits as torch's dynamic quantisation has them: one scale a weight and one for all activations."""

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
    """On activations with outliers, as a trained network has them: some norm weights are 50 times the others."""
    weights = stored(tiny_args())
    for name, weight in weights.items():
        if name.endswith("_norm.weight"):
            weight[7] *= 50
    expected = reference(weights)
    model, packing = build(weights, tiny_args(), "int8", CPU, [source])
    packing.wait()
    ours, naive = relative(run(model), expected), relative(run(quantised_by_torch(weights)), expected)
    assert ours <= 0.05
    assert ours < naive / 3


def test_bf16_is_what_torch_computes_in_bfloat16(source: Path) -> None:
    """Torch's own layers with the file's tensors in them."""
    weights = stored(tiny_args())
    model, packing = build(weights, tiny_args(), "bf16", CPU, [source])
    assert packing.done
    assert all(type(module) is nn.Linear for name, module in model.named_modules() if name.endswith(("wq", "output")))
    assert 1e-4 < relative(run(model), reference(weights)) <= 0.05


# --- Memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_held_and_not_copied(source: Path, precision: str, dtype: torch.dtype) -> None:
    """Until they are packed the file's own tensors multiply; the embedding stays one of them, tied to the output."""
    weights = stored(tiny_args(), dtype)
    model, packing = build(weights, tiny_args(), precision, CPU, [source])
    own = {weight.untyped_storage().data_ptr() for weight in weights.values()}
    for form in forms(model):
        assert isinstance(form, Blocks)
        assert {as_tensor(weight).untyped_storage().data_ptr() for weight in form.weights} <= own
    embedding = weights["tok_embeddings.weight"].data_ptr()
    *_, output = forms(model)
    assert isinstance(output, Blocks)
    assert model.tok_embeddings.weight.data_ptr() == as_tensor(output.weights[0]).data_ptr() == embedding
    packing.wait()
    assert model.tok_embeddings.weight.data_ptr() == embedding


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_that_have_the_type_stay_the_files(source: Path, precision: str, dtype: torch.dtype) -> None:
    """Nothing to convert is nothing copied; what is converted stays tied."""
    weights = stored(tiny_args(), dtype)
    model, _ = build(weights, tiny_args(), precision, CPU, [source])
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr()
    other = {"fp32": "bf16", "bf16": "fp32"}[precision]
    model, _ = build(weights, tiny_args(), other, CPU, [source])
    assert model.output.weight is model.tok_embeddings.weight
    assert model.output.weight.data_ptr() != weights["output.weight"].data_ptr()


def test_packing_leaves_the_files_weights_as_they_are(source: Path) -> None:
    """A mapped tensor may be one that nobody can write to."""
    weights = stored(tiny_args(n_layers=1), torch.float32)
    before = {name: weight.clone() for name, weight in weights.items()}
    for precision in ("fp16", "int8"):
        build(weights, tiny_args(n_layers=1), precision, CPU, [source])[1].wait()
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


# --- Weights that float16 has no number for ---------------------------------------------------


@pytest.mark.parametrize("packed", [pytest.param(True, marks=needs_fbgemm), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_beyond_float16_stay_what_they_are(
    source: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, packed: bool
) -> None:
    """fp16 multiplies such a piece as the file holds it, and neither changes it nor the answer."""
    monkeypatch.setattr(precision_module, "packs", lambda: packed)
    args = tiny_args(n_layers=1)
    # All others are numbers of float16, so that what is measured is this one.
    weights = {name: weight.to(dtype) for name, weight in stored(args, tied=False).items()}
    weights["layers.0.attention.wo.weight"][3, 5] = 1e6
    before = weights["layers.0.attention.wo.weight"].clone()
    expected = reference(weights, args)
    model, packing = build(weights, args, "fp16", CPU, [source])
    packing.wait()
    assert torch.equal(weights["layers.0.attention.wo.weight"], before)
    assert relative(run(model), expected) <= 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("precision", "name"),
    [
        *[("fp16", name) for name in ("norm.weight", "tok_embeddings.weight")],
        *[
            ("fp16", name)
            for name in ("layers.1.feed_forward.w2.weight", "layers.0.attention.wk.weight", "output.weight")
        ],
        *[("int8", name) for name in ("norm.weight", "layers.1.feed_forward.w2.weight", "output.weight")],
    ],
)
def test_damaged_weights_are_an_error_in_every_form(source: Path, precision: str, value: float, name: str) -> None:
    """Before and after packing."""
    weights = stored(tiny_args(), tied=False)
    weights[name].view(-1)[7] = value
    model, packing = build(weights, tiny_args(), precision, CPU, [source])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="not numbers, so its weights are damaged"):
            Engine(model, 100).next_logits([0, 1, 2])
        packing.wait()


# --- Without fbgemm ---------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 1e-5), ("int8", 0.03)])
def test_without_fbgemm_the_answers_are_as_right(
    weights: dict[str, Tensor], source: Path, monkeypatch: pytest.MonkeyPatch, precision: str, bound: float
) -> None:
    """The packed form is one that torch multiplies in blocks."""
    monkeypatch.setattr(precision_module, "packs", lambda: False)
    monkeypatch.setattr("llama_scratch.linear.packs", lambda: False)
    expected = reference(weights)
    for _ in range(2):  # 8 bits are kept after the first time
        model, packing = build(weights, tiny_args(), precision, CPU, [source])
        assert relative(run(model), expected) <= 5e-6
        packing.wait()
        assert {type(form) for form in forms(model)} == ({Blocks} if precision == "fp16" else {Blocks, Columns})
        assert relative(run(model), expected) <= bound
    linear = sum(weight.numel() for name, weight in weights.items() if weight.ndim == 2 and "tok_" not in name)
    assert weight_bytes(model) == linear * (2 if precision == "fp16" else 1)


# --- While it is packed -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("packed") / "Tiny")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_answers_are_named_after_the_weights_that_gave_them(model_dir: Path, precision: str) -> None:
    """fp32 before packing, which begins after the first answer; then what was asked for."""
    llama = Llama.load(model_dir, precision=precision, device="cpu")
    expected = Llama.load(model_dir, precision="fp32", device="cpu").predict("the nation")
    first = llama.predict("the nation")
    assert llama.info.precision == precision
    assert first.model.precision == expected.model.precision == "fp32"
    assert first.next.logprob == pytest.approx(expected.next.logprob, abs=1e-4)
    assert not llama.engine.packing.begun
    llama.prepare()
    packed = llama.predict("the nation")
    assert packed.model.precision == precision
    assert packed.model.name == first.model.name
    assert packed.next.logprob == pytest.approx(expected.next.logprob, abs=0.2)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_answer_while_it_is_packed_is_right(source: Path, precision: str) -> None:
    """After each job: some layers are packed and some are not, and the network says what it should."""
    weights = stored(tiny_args())
    model, packing = build(weights, tiny_args(), precision, CPU, [source])
    expected = reference(weights)
    answers = []
    for function, _ in packing._jobs:
        function()
        answers.append(relative(run(model), expected))
    assert len(answers) == 13
    assert max(answers) <= (1e-5 if precision == "fp16" else 0.03)
    if precision == "int8":
        assert answers[0] > 1e-5  # the first job did exchange something


def test_answers_and_packing_at_the_same_time(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hundreds of small pieces exchanged under the network's hands."""
    monkeypatch.setattr(precision_module, "_FUSED", 0)
    monkeypatch.setattr(precision_module, "_PIECE", 8000)
    weights = stored(tiny_args())
    model, packing = build(weights, tiny_args(), "fp16", CPU, [source])
    expected = reference(weights)
    assert packing._total == sum(size for _, size in packing._jobs)
    packing.start()
    for _ in range(5):
        assert relative(run(model), expected) <= 1e-5
    packing.wait()
    assert relative(run(model), expected) <= 1e-5


def test_an_answer_during_which_packing_began_is_not_named_fp32(source: Path) -> None:
    """Its last layers were multiplied in 8 bits."""
    model, packing = build(stored(tiny_args()), tiny_args(), "int8", CPU, [source])
    engine = Engine(model, 100, packing)
    engine.next_logits([1, 2, 3])
    with model.layers[0].register_forward_hook(lambda *_: packing.wait()):
        packing._held = True  # until the network runs
        threading.Timer(0.1, lambda: release(packing)).start()
        assert engine.next_logits([4, 5, 6]).packed


def release(packing: Background) -> None:
    packing._held = False


def test_an_interruption_between_the_projections_leaves_the_next_answer_right(source: Path) -> None:
    """Ctrl-C after wq was computed with wk and wv; then the same prompt and another one."""
    weights = stored(tiny_args())
    model, packing = build(weights, tiny_args(), "fp16", CPU, [source])
    packing.wait()
    expected, other = reference(weights), IDS.flip(1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for layer in model.layers:
        for name in ("attention.wk", "attention.wv", "feed_forward.w3"):
            with layer.get_submodule(name).register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
                run(model, other)
            assert relative(run(model), expected) <= 1e-5
    assert all(module.shared._x is None for module in projections(model) if isinstance(module, SharedProjection))


# --- Which one --------------------------------------------------------------------------------

FILES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("stored", FILES, ids=str)
@pytest.mark.parametrize("asked", PRECISIONS)
def test_a_precision_that_is_named_is_taken(asked: str, stored: torch.dtype) -> None:
    """Everywhere."""
    check_name(asked)
    for device in (CPU, CUDA, MPS, None):
        assert choose(asked, stored, device) == asked


@pytest.mark.parametrize(
    ("device", "able", "expected"),
    [
        (CPU, True, ["fp16", "fp16", "fp16"]),
        (None, True, ["fp16", "fp16", "fp16"]),
        (CPU, False, ["bf16", "fp32", "fp32"]),
        (CUDA, True, ["bf16", "fp32", "fp32"]),
        (CUDA, False, ["fp32", "fp32", "fp32"]),
        (MPS, True, ["bf16", "fp32", "fp32"]),
        (MPS, False, ["fp32", "fp32", "fp32"]),
    ],
)
def test_auto_is_the_fastest_whose_answers_are_the_references(
    monkeypatch: pytest.MonkeyPatch, device: torch.device | None, able: bool, expected: list[str]
) -> None:
    """able: a CPU packs, a GPU computes in bfloat16."""
    monkeypatch.setattr(precision_module, "packs", lambda: able and device in (CPU, None))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: able)
    monkeypatch.setattr("torch.backends.mps.is_macos_or_newer", lambda *_: able)
    assert [choose("auto", stored, device) for stored in FILES] == expected


@pytest.mark.parametrize("name", ["fp8", "", "FP16", "int2"])
def test_another_name_is_a_usage_error(name: str) -> None:
    """With those that there are."""
    check_name("auto")
    with pytest.raises(UsageError) as caught:
        check_name(name)
    expected = "expected one of auto, fp32, bf16, fp16, int8, int4 (--precision)."
    assert str(caught.value) == f"The precision is {name!r}, {expected}"


# --- Gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_differentiable_network_is_the_reference_with_gradients(
    weights: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Of the logits with respect to the tokens' vectors, as torch's own layers give them; no weight is copied."""
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
    # The same memory for all that is large, and nothing in the file's own tensors was changed.
    for name, module in model.named_modules():
        if isinstance(module, Differentiable):
            assert module.weight.data_ptr() == held[f"{name}.weight"].data_ptr()
    assert model.tok_embeddings.weight.data_ptr() == held["tok_embeddings.weight"].data_ptr()
    assert all(torch.equal(weight, before[name]) and weight.dtype == dtype for name, weight in held.items())
