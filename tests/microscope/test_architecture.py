"""/arch: parameters against the module, FLOPs against torch's counter, and bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama_scratch.errors import UsageError
from llama_scratch.hooks import hooked
from llama_scratch.inference import speed
from llama_scratch.llama import Llama
from llama_scratch.microscope.architecture import Architecture, WeightRow, _parts, architecture
from llama_scratch.model import KVCache, Transformer
from llama_scratch.render.drawings.diagram import Diagram
from llama_scratch.render.pages import architecture as pages
from llama_scratch.render.pages.architecture import short
from llama_scratch.repl.commands import run_command
from llama_scratch.repl.session import Session
from tests.helpers.checkpoints import tiny_args, write_meta
from tests.helpers.sessions import run, shown, started


@pytest.fixture(scope="module")
def llama(tiny_dir: Path) -> Llama:
    """The small random model in fp32."""
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture
def session(llama: Llama) -> Session:
    return started(llama)


def plain(llama: Llama, device: str = "meta") -> Transformer:
    """A network of the same dimensions, with torch's own layers."""
    with torch.device(device):
        return Transformer(llama.args)


def named(found: Architecture, name: str) -> WeightRow:
    return next(part for part in found.parts if part.name == name)


def test_parts_are_those_of_the_module(llama: Llama) -> None:
    """Each weight with its shape and count. A tied output counts once."""
    found = architecture(llama, 5)
    for part in found.parts:
        if part.shape is not None:
            path = f"layers.2.{part.name}" if part.layered else part.name
            weight = plain(llama).get_submodule(path).weight
            assert isinstance(weight, torch.Tensor)
            assert weight.shape == part.shape
            assert part.count == (3 if part.layered else 1)
    assert found.tied
    assert named(found, "output").parameters == 0
    total = sum(weight.numel() for name, weight in plain(llama).named_parameters() if name != "output.weight")  # tied
    assert found.parameters == total == llama.args.n_parameters(tied=True) == llama.info.parameters


def test_an_output_of_its_own_counts(tmp_path: Path) -> None:
    other = Llama.load(write_meta(tmp_path / "untied", tied=False), precision="fp32", device="cpu")
    found = architecture(other, 1)
    assert not found.tied
    assert found.parameters == sum(weight.numel() for weight in plain(other).parameters())
    assert named(found, "output").parameters == other.args.vocab_size * other.args.dim


@pytest.mark.parametrize("length", [1, 7, 40])
def test_flops_are_those_that_torch_counts(llama: Llama, length: int) -> None:
    """For one token after the others, in linear layers and attention."""
    model = plain(llama, "cpu")
    cache = KVCache(llama.args, length)
    ids = torch.arange(length)[None]
    # torch does not count fused attention on a CPU. A hook on the probabilities makes it two matrix products.
    hooks = {f"layers.{layer}.attention.probs": lambda _value, _start: None for layer in range(3)}
    with torch.inference_mode(), hooked(model, hooks):
        if length > 1:
            model(ids[:, :-1], cache)
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], cache)
    found = architecture(llama, length)
    assert counter.get_total_flops() == found.flops == speed.decode_flops(llama.args, length - 1)
    counts = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    assert counts["aten.bmm"] == named(found, "attention.scores").flops + named(found, "attention.mixing").flops > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_bytes_are_those_that_are_read_and_kept(tiny_dir: Path, precision: str) -> None:
    """The bytes of the weights in their current format, and of the cache per token."""
    other = Llama.load(tiny_dir, precision=precision, device="cpu")
    other.prepare()
    other.predict([1, 2, 3], top=1)
    found = architecture(other, 3)
    assert found.weight_bytes == other.weight_bytes
    capacity = other.engine._cache.capacity
    assert found.kv_bytes_per_token * capacity == other.engine.cache_bytes
    assert found.kv_bytes == 3 * found.kv_bytes_per_token
    other.close()


def test_the_1b_shape() -> None:
    """1,235,814,400 parameters, and two operations per weight of a linear layer."""
    args = tiny_args(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256, multiple_of=256)
    parts = _parts(args, 1, tied=True)
    assert sum(part.parameters for part in parts) == 1_235_814_400
    products = sum(part.flops for part in parts if part.shape)
    assert products == 2 * args.linear_parameters() == 2 * 1_235_746_816
    assert args.kv_bytes_per_token(2) == 32 * 1024
    wk = next(part for part in parts if part.name == "attention.wk")
    assert (wk.shape, wk.count, wk.parameters) == ((512, 2048), 16, 16 * 512 * 2048)


def test_the_length_is_the_text_s_or_the_one_that_is_given(session: Session) -> None:
    assert run(session, "/arch")["length"] == 1024
    session.predict("the reader")
    facts = run(session, "/arch")
    assert facts["length"] == len(session.ids)
    longer = run(session, "/arch 100")
    assert longer["length"] == 100
    scores = 4 * 3 * 4 * 64 * (100 - facts["length"])
    assert longer["flops_per_token"] - facts["flops_per_token"] == scores
    assert sum(part["parameters"] for part in facts["parts"]) == facts["parameters"]
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize("length", ["0", "-1", "x", "1.5", "131073", "9" * 50])
def test_a_length_that_cannot_be(session: Session, length: str) -> None:
    with pytest.raises(UsageError):
        run_command(session, f"/arch {length}")


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("plain", [False, True])
def test_it_fits_the_screen(session: Session, width: int, plain: bool) -> None:
    """Every module with its shape, and the total."""
    session.change_settings(plain=plain)
    reply = run_command(session, "/arch")[1]
    assert reply is not None
    screen = shown(reply.view or "", width)
    assert plain or all(len(row) <= width for row in screen.splitlines())
    words = screen.split()
    for name in ("embedding", "wq", "wk", "wv", "q·k", "probs·v", "wo", "w1", "w2", "w3", "output", "tied"):
        assert any(word.strip(",") == name for word in words), name
    assert f"{session.llama.info.parameters:,}" in screen
    assert "%" in screen


def test_every_part_is_in_one_group(llama: Llama) -> None:
    """Therefore, the shares add up to 100 %."""
    groups = [name for names in pages._GROUPS.values() for name in names]
    assert sorted(groups) == sorted(part.name for part in architecture(llama, 1).parts)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (576, "576"),
        (1000, "1k"),
        (17_280, "17.3k"),
        (999_999, "1M"),
        (134_515_008, "135M"),
        (1.24e9, "1.24G"),
    ],
)
def test_large_numbers_in_three_digits(count: float, text: str) -> None:
    assert short(count) == text


def test_the_drawing_has_every_weight_with_its_shape(llama: Llama) -> None:
    found = architecture(llama, 1)
    (drawn,) = (part for part in pages.page(found).parts if isinstance(part, Diagram))
    parts = [*drawn.before, *(part for branch in drawn.branches for row in branch for part in row), *drawn.after]
    weights = [part for part in found.parts if part.shape]
    shapes = [(part.name.rpartition(".")[2], "×".join(f"{size:,}" for size in part.shape or ())) for part in weights]
    assert {f"{name} {shape}" for name, shape in shapes} == {
        part.detail.removesuffix(", tied") for part in parts if part.detail.split()[0] in dict(shapes)
    }
    assert sum(part.strength for part in parts) == pytest.approx(1)
    assert [part.name for part in drawn.after[-2:]] == ["softmax", "argmax"]
    assert f"{found.args.dim:,}" in drawn.stream
    assert drawn.layers == f"{found.args.n_layers} layers"


def test_the_sentence_names_the_largest_group(llama: Llama) -> None:
    found = architecture(llama, 1)
    held = {group: sum(p.parameters for p in found.parts if p.name in names) for group, names in pages._GROUPS.items()}
    group = max(held, key=lambda name: held[name])
    sentence = pages.finding(found)
    assert f"{found.parameters:,} parameters" in sentence
    assert sentence.startswith(f"{100 * held[group] / found.parameters:.1f} %")
    assert group in sentence
