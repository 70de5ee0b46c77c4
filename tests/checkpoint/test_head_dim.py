"""Models with an explicit head width: head_dim · n_heads differs from dim.

Real ones are Llama-3.1-Nemotron-Nano-4B (32 heads of 128 in 3,072) and Minitron-4B-Width.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.convert import convert
from llama_scratch.checkpoint.verify import verify
from llama_scratch.config import ModelArgs
from llama_scratch.errors import CheckpointError, ModelNotFoundError
from llama_scratch.microscope.rope import rope
from llama_scratch.precision.lazy_weight import as_tensor
from llama_scratch.precision.memory_estimate import memory_needed
from llama_scratch.system.progress import silent
from tests.helpers import meta_files as shards
from tests.helpers.checkpoints import tiny_args, tiny_params, write_meta
from tests.helpers.reference import forward
from tests.helpers.weights import same

# All heads together wider or narrower than the residual stream; heads that do not divide dim; scaled RoPE.
WIDE = tiny_params(dim=192, n_heads=4, n_kv_heads=2, head_dim=64, n_layers=2)
NARROW = tiny_params(dim=192, n_heads=4, n_kv_heads=1, head_dim=32, n_layers=2)
UNEVEN = tiny_params(dim=128, n_heads=3, n_kv_heads=3, head_dim=64, n_layers=2)
SHAPES = {"wide": WIDE, "narrow": NARROW, "uneven": UNEVEN}
IDS = [(7 * i * i + 3 * i) % 256 for i in range(80)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory per shape. Read only."""
    folder = tmp_path_factory.mktemp("heads")
    return {name: write_meta(folder / name, params=params) for name, params in SHAPES.items()}


def expected(directory: Path) -> Tensor:
    """The reference's logits, (T, vocab_size)."""
    params = json.loads((directory / "params.json").read_text())
    weights: Any = torch.load(directory / "consolidated.00.pth")
    return forward(weights, params | {"rope_factor": 32}, IDS).logits


def distance(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 1e-5), ("fp16", 1e-3), ("int8", 0.1)])
def test_logits_are_the_references(models: dict[str, Path], name: str, precision: str, bound: float) -> None:
    """As one chunk, and token by token with a cache."""
    llama = Llama.load(models[name], precision=precision, device="cpu")
    reference = expected(models[name])
    assert distance(llama.logits(IDS), reference) < bound
    steps = [llama.predict(IDS[: n + 1]).next.id for n in (69, 70, 71)]
    if bound < 0.1:
        assert steps == reference[69:72].argmax(-1).tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_every_form_holds_it(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Meta → Hugging Face → GGUF → Meta: the same shape and weights, and `verify` passes in each format."""
    source = open_checkpoint(models[name])
    at = models[name]
    for form, place in (("hf", "hf"), ("gguf", "a.gguf"), ("meta", f"{name}-back")):
        convert(at, tmp_path / place, form)
        at = tmp_path / place
        read = open_checkpoint(at)
        assert (read.args.head_dim, read.args.dim, read.args.n_heads) == (
            source.args.head_dim,
            source.args.dim,
            source.args.n_heads,
        )
        assert verify(at).wrong == 0
    assert read.args == source.args
    assert same(read.load(silent), source.load(silent))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["head_dim"] == source.args.head_dim


@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_transformers_reads_what_is_written(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    """It requires that hidden_size is a multiple of the number of heads, whatever head_dim is."""
    from transformers import LlamaForCausalLM

    convert(models[name], tmp_path / "hf", "hf")
    theirs: Any = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.inference_mode():
        logits = theirs(torch.tensor([IDS])).logits[0]
    assert distance(Llama.load(models[name], precision="fp32", device="cpu").logits(IDS), logits) < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_the_microscope(models: dict[str, Path], name: str) -> None:
    """Shapes and sums: the components add up to the logits, the shares to 1."""
    llama = Llama.load(models[name], precision="fp32", device="cpu")
    args = llama.args
    seen = llama.inspect(IDS[:12])
    assert tuple(seen.attention[1].shape) == (args.n_heads, 12, 12)
    assert torch.allclose(seen.attention[1].sum(-1), torch.ones(args.n_heads, 12), atol=1e-5)
    assert tuple(seen.activations("layers.1.attention.heads").shape) == (12, args.n_heads, args.head_dim)
    assert tuple(seen.residual[1].shape) == (12, args.dim)
    why = seen.attribution()
    assert sum(part.logit for part in why.contributions) == pytest.approx(why.logit, abs=1e-3)
    assert len(why.contributions) == 1 + args.n_layers * (args.n_heads + 1)
    whole, without = seen.prediction, seen.ablate("L1.H1").prediction
    assert whole.next.logprob != without.next.logprob
    turned = rope(llama, IDS[:12], layer=1, head=1)
    assert len(turned.query) == args.head_dim // 2
    probs = torch.tensor([match.product for match in turned.matches]).softmax(0)
    assert torch.allclose(probs, seen.attention[1, 1][-1].flip(0), atol=1e-5)


def test_memory_counts_the_heads(models: dict[str, Path]) -> None:
    """The cache has keys of width head_dim, and activations are as wide as all queries."""
    wide = tiny_args(**WIDE)
    assert wide.kv_bytes_per_token(4) == 2 * wide.n_layers * 2 * 64 * 4
    derived = tiny_args(**WIDE | {"head_dim": None})
    both = [memory_needed(a, "fp32", None, 100, torch.device("cpu"), tied=True) for a in (wide, derived)]
    assert both[0]["KV cache"] > both[1]["KV cache"]
    assert both[0]["activations"] > both[1]["activations"]


def test_a_shape_is_said_and_compared() -> None:
    """head_dim = dim / n_heads is the same shape whether it is stated or not."""
    assert tiny_args(head_dim=64) == tiny_args()
    assert tiny_args(head_dim=32) != tiny_args()
    assert ModelArgs(64, 1, 3, 1, 9, 8, 1e-5, 1e4, None, 9, head_dim=16).weight_shapes()[
        "layers.0.attention.wo.weight"
    ] == (64, 48)
    with pytest.raises(CheckpointError, match="head_dim"):
        tiny_args(head_dim=63)


def test_shards(models: dict[str, Path], tmp_path: Path) -> None:
    """Each holds some of the heads; the rows of wq reveal the number of shards."""
    weights = torch.load(models["wide"] / "consolidated.00.pth")
    directory = shards.write(tmp_path / "m", shards.split(weights, 2), params=WIDE)
    shutil.copy(models["wide"] / "tokenizer.model", directory)
    read = open_checkpoint(directory).load(silent)
    assert all(torch.equal(as_tensor(read[name]), weight) for name, weight in weights.items())
    (directory / shards.shard(1)).unlink()
    with pytest.raises(ModelNotFoundError, match="Fetch the missing shards"):
        open_checkpoint(directory).load(silent)
