"""`info`: a description of a model as JSON for programs and as a table for users."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_scratch.checkpoint import describe as info
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.base import WeightStorage
from llama_scratch.checkpoint.convert import convert
from llama_scratch.checkpoint.describe import describe
from llama_scratch.errors import UsageError
from llama_scratch.llama import Llama
from llama_scratch.precision import PRECISIONS
from llama_scratch.precision.memory_estimate import memory_needed
from llama_scratch.render.reports import model_facts, rows
from llama_scratch.render.text import as_text, size
from llama_scratch.system.progress import Progress, silent
from tests.helpers.checkpoints import tiny_args, write_meta
from tests.helpers.command_line import Runner


@pytest.fixture(scope="module")
def facts(tiny_dir: Path) -> dict[str, Any]:
    """The output of `info` for the small random model."""
    return describe(tiny_dir, None, None, silent, device="cpu")


def test_the_parts_are_all_parameters_once(facts: dict[str, Any]) -> None:
    """Each weight counts once, in the part given by its name; a tied output counts as 0."""
    counts = {part: value["parameters"] for part, value in facts["parts"].items()}
    assert list(counts) == ["embedding", "attention", "feed_forward", "norms", "output"]
    assert counts["embedding"] == 556 * 256
    assert counts["attention"] == 3 * (2 * 256 * 256 + 2 * 128 * 256)
    assert counts["feed_forward"] == 3 * 3 * 1024 * 256
    assert counts["norms"] == 7 * 256
    assert counts["output"] == 0
    assert sum(counts.values()) == facts["parameters"] == 3_093_248
    assert sum(value["share"] for value in facts["parts"].values()) == pytest.approx(1)
    assert facts["parts"]["embedding"]["share"] == pytest.approx(142_336 / 3_093_248)


def test_an_untied_output_is_a_part_too(tmp_path: Path) -> None:
    facts = describe(write_meta(tmp_path / "m", tied=False), None, None, silent)
    assert facts["parts"]["output"]["parameters"] == 556 * 256
    assert sum(part["parameters"] for part in facts["parts"].values()) == facts["parameters"]
    assert facts["parameters"] == sum(prod(shape) for shape in tiny_args().weight_shapes().values())
    assert model_facts(facts)["output"].startswith("142,336 parameters (4.4 %)")


def test_files_and_their_bytes(tiny_dir: Path, facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All files count; the path is the first one's."""
    weights = tiny_dir / "consolidated.00.pth"
    assert facts["files"] == [{"name": weights.name, "bytes": weights.stat().st_size}]
    assert facts["bytes"] == weights.stat().st_size
    opened = open_checkpoint(tiny_dir)
    monkeypatch.setattr(
        info, "open_checkpoint", lambda *_: replace(opened, files=(weights, tiny_dir / "params.json"), license="MIT")
    )
    several = describe(tiny_dir, None, None, silent)
    assert several["bytes"] == facts["bytes"] + (tiny_dir / "params.json").stat().st_size
    assert [file["name"] for file in several["files"]] == ["consolidated.00.pth", "params.json"]
    assert f"{weights} and 1 more (meta, 6 MB)" == model_facts(several)["file"]
    assert several["licence"] == model_facts(several)["license"] == "MIT"


def test_a_license_that_is_not_stated(facts: dict[str, Any]) -> None:
    assert facts["licence"] is None
    assert model_facts(facts)["license"] == "not stated in the files"


def test_memory_is_what_loading_asks_for(facts: dict[str, Any]) -> None:
    """For each precision the same total as in loading, for 4,096 tokens or the context if it is smaller."""
    memory = facts["memory"]
    assert (memory["context"], memory["device"]) == (4096, "cpu")
    assert list(memory["needed"]) == list(PRECISIONS)
    for name, parts in memory["needed"].items():
        own = memory_needed(tiny_args(), name, torch.bfloat16, 4096, torch.device("cpu"), tied=True)
        assert parts == {**own, "total": sum(own.values())}
    assert memory["needed"]["bf16"]["weights"] == 0  # as in the file, memory-mapped
    assert "bf16 " in model_facts(facts)["memory"]
    assert "with 4,096 tokens on cpu" in model_facts(facts)["memory"]


def test_a_context_below_that_is_the_models(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_checkpoint(tiny_dir)
    short = replace(opened, args=replace(opened.args, max_seq_len=128))
    monkeypatch.setattr(info, "open_checkpoint", lambda *_: short)
    assert describe(tiny_dir, None, None, silent)["memory"]["context"] == 128


@pytest.mark.parametrize(
    ("format", "files", "types", "blocks"),
    [
        ("meta", 1, ["bfloat16"], False),
        ("meta", 8, ["bfloat16"], False),
        ("huggingface", 8, ["bfloat16"], False),
        ("gguf", 1, ["F32", "BF16"], False),
        ("gguf", 1, ["F32", "Q8_0"], True),
    ],
)
def test_quantized_blocks_are_of_no_type(format: str, files: int, types: list[str], blocks: bool) -> None:
    """Unlike shards, which are multiplied while mapped."""
    checkpoint: Any = SimpleNamespace(format=format, files=("x",) * files)
    found = info._dtype(checkpoint, WeightStorage(dict.fromkeys(types, 1), True, torch.bfloat16))
    assert found is (None if blocks else torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")]
)
def test_auto_is_what_loading_makes_of_it(tmp_path: Path, dtype: torch.dtype, precision: str) -> None:
    """In each format; weights in the file's type take no extra memory."""
    meta = write_meta(tmp_path / "Meta", dtype=dtype)
    formats = {"meta": meta, "huggingface": tmp_path / "HF", "gguf": tmp_path / "model.gguf"}
    convert(meta, formats["huggingface"], "hf")
    convert(meta, formats["gguf"], "gguf")
    for name, path in formats.items():
        facts = describe(path, None, None, silent, device="cpu")
        assert (facts["format"], facts["precision"]) == (name, precision)
        assert Llama.load(path, device="cpu").info.precision == precision
        assert [kind for kind, parts in facts["memory"]["needed"].items() if not parts["weights"]] == [precision]


def test_auto_of_quantized_blocks_is_fp16(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 and fp32 multiply the mapped blocks, except for a small model without kernels."""
    for small in (True, False):
        monkeypatch.setattr("llama_scratch.precision.rows._SMALL_MODEL", 1 << 28 if small else 0)
        facts = describe(smollm2_path, None, None, silent, device="cpu")
        assert facts["precision"] == "fp16"
        needed = facts["memory"]["needed"]
        assert needed["fp16"]["weights"] == 2 * facts["parameters"] * small
        assert needed["fp32"]["weights"] == 4 * facts["parameters"] * small
        assert needed["bf16"]["weights"] == 2 * facts["parameters"]
    assert Llama.load(smollm2_path, device="cpu").info.precision == "fp16"


@pytest.mark.parametrize(("kind", "known"), [("Q8_0", True), ("Q2_K", False)])
def test_blocks_that_no_kernel_knows_are_converted(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, known: bool
) -> None:
    """They are counted as converted, even if others are multiplied while mapped."""
    monkeypatch.setattr("llama_scratch.precision.rows._SMALL_MODEL", 0)
    stored = WeightStorage({"F32": 61, "Q4_K": 3, kind: 208}, True, torch.float32)
    checkpoint = replace(open_checkpoint(smollm2_path), storage=lambda _: stored)
    monkeypatch.setattr(info, "open_checkpoint", lambda *_: checkpoint)
    needed = describe(smollm2_path, None, None, silent, device="cpu")["memory"]["needed"]
    for precision, width in (("fp16", 2), ("fp32", 4)):
        assert needed[precision]["weights"] == (0 if known else width * checkpoint.args.n_parameters(tied=True))


def test_activations_are_checked_and_counted(tiny_dir: Path) -> None:
    """In bfloat16, the cache takes half the memory."""
    auto, rounded = (
        describe(tiny_dir, None, None, silent, device="cpu", activations=name)["memory"]["needed"]["bf16"]["KV cache"]
        for name in ("auto", "bf16")
    )
    assert auto == 2 * rounded
    with pytest.raises(UsageError, match=r"expected one of auto, fp32, bf16 \(`activations`\)\.$"):
        describe(tiny_dir, None, None, silent, activations="fp8")


def test_the_tokenizer_and_the_chat_format(tiny_dir: Path, facts: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = facts["tokenizer"]
    assert (tokenizer["kind"], tokenizer["pattern"]) == ("byte-level BPE", "llama-bpe")
    assert (tokenizer["tokens"], tokenizer["special"]) == (556, 256)
    assert tokenizer["bos"] == "<|begin_of_text|>"
    assert tokenizer["stops"] == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert facts["chat"] is False
    assert "base model" in model_facts(facts)["chat"]
    instruct = describe(write_meta(tmp_path / "Tiny-Instruct"), None, None, silent)
    assert instruct["chat"] is True
    assert model_facts(instruct)["chat"] == "has a chat template"


def test_texts_of_a_file_cannot_command_the_terminal(facts: dict[str, Any]) -> None:
    """A special token may be any text, including control characters."""
    names = {"bos": "\x1b[2J", "stops": ["\x1b]0;x\x07"]}
    shown = model_facts({**facts, "name": "\x1b[31m", "path": "/\x1b[0m", "tokenizer": facts["tokenizer"] | names})
    assert all(value.isprintable() for value in shown.values())
    assert "no stop token" in model_facts({**facts, "tokenizer": facts["tokenizer"] | {"stops": []}})["tokenizer"]


@pytest.mark.parametrize(
    ("factor", "said", "by_option"),
    [
        (None, "scaled by a factor of 32", False),
        (32, "scaled by a factor of 32", False),
        (8, "scaled by a factor of 8 (--rope-factor)", True),
        (1, "not scaled (--rope-factor)", True),
    ],
)
def test_the_rope_factor_in_force_and_where_it_is_from(
    tiny_dir: Path, factor: float | None, said: str, by_option: bool
) -> None:
    facts = describe(tiny_dir, None, factor, silent)
    assert facts["rope"]["by_option"] is by_option
    assert model_facts(facts)["RoPE"] == f"base 500,000, {said}"


def test_divisors_of_their_own(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file may have an arbitrary divisor for each pair."""
    opened = open_checkpoint(tiny_dir)
    args = replace(opened.args, rope_scaling=None, rope_divisors=tuple(range(1, 33)))
    monkeypatch.setattr(info, "open_checkpoint", lambda *_: replace(opened, args=args))
    facts = describe(tiny_dir, None, None, silent)
    assert json.loads(json.dumps(facts))["rope"]["divisors"] == list(range(1, 33))
    assert "divided by its own factor, 1 to 32" in model_facts(facts)["RoPE"]


def test_the_session_says_the_factor_that_it_runs_with(llama_scratch: Runner, tiny_dir: Path) -> None:
    for options, factor in (([], 32), (["--rope-factor", "8"], 8), (["--rope-factor", "1"], None)):
        result = llama_scratch("--model-dir", str(tiny_dir), *options, "--commands", "--json", stdin=b"/info\n")
        scaling = json.loads(result.out)["rope"]["scaling"]
        assert (scaling and scaling["factor"]) == factor


def test_what_is_there_for_programs_stays(llama_scratch: Runner, smollm2_path: Path) -> None:
    """One object with the keys that programs rely on, for the open model."""
    result = llama_scratch("info", str(smollm2_path), "--json")
    assert (result.code, result.out.count("\n")) == (0, 1)
    facts = json.loads(result.out)
    old = {"name", "format", "path", "bytes", "stored", "precision", "parameters", "tied_output", "shape", "rope"}
    old |= {"context", "tokenizer"}
    assert old <= facts.keys()
    assert set(facts) - old == {"files", "licence", "parts", "chat", "memory", "kernels", "warnings"}
    assert {"tokens", "special", "bos", "stops"} <= facts["tokenizer"].keys()
    assert {"theta", "scaling"} <= facts["rope"].keys()
    assert facts["licence"] == "apache-2.0"
    assert facts["tokenizer"]["pattern"] == "smollm"
    assert facts["chat"] is True
    assert facts["bytes"] == 98_362_432
    assert facts["parts"]["norms"]["parameters"] == 61 * 576
    lines = llama_scratch("info", str(smollm2_path)).out.splitlines()
    assert lines == [f"{name}: {value}" for name, value in model_facts(facts).items()]


@pytest.mark.parametrize("width", [80, 40])
def test_the_table_fits(facts: dict[str, Any], width: int) -> None:
    text = as_text(rows(model_facts(facts)), width)
    assert max(map(len, text.splitlines())) <= width
    for name in model_facts(facts):
        assert f"\n {name} " in f"\n{text}"


@pytest.mark.parametrize(("count", "text"), [(98_362_432, "98 MB"), (2_471_645_608, "2.47 GB"), (10**9, "1.00 GB")])
def test_sizes_for_people(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize("command", ["info", "verify"])
def test_bringing_a_remote_model_here_shows_progress(
    llama_scratch: Runner, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """In the progress bar of the command."""
    seen: list[str] = []

    @contextmanager
    def bar(*_: object) -> Iterator[Progress]:
        yield lambda stage, done, total: seen.append(stage)

    def local_copy(address: str, progress: Progress) -> Path:
        progress(f"fetching {address}", 1, 2)
        return tiny_dir

    monkeypatch.setattr("llama_scratch.cli.models.progress_bar", bar)
    monkeypatch.setattr("llama_scratch.download.locate.local_copy", local_copy)
    assert llama_scratch(command, "gs://bucket/m").code == 0
    assert seen[0] == "fetching gs://bucket/m"
    assert len(seen) > 1
