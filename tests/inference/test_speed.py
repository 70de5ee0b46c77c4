"""`bench` runs, and its counts and output are correct. No test asserts a time."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llama_scratch import Llama
from llama_scratch.cli import run
from llama_scratch.inference import speed as bench
from llama_scratch.model import Transformer
from llama_scratch.render.reports import bench_lines, bench_table
from tests.helpers.checkpoints import tiny_args

SMALL = ("--prefill", "8,4", "--decode-at", "3", "--tokens", "2", "--runs", "2")


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BANDWIDTH_BYTES", 1_000_000)


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    """The small random model in fp32."""
    return Llama.load(tiny_dir, precision="fp32", context=64)


def test_flops_are_those_that_torch_counts(tiny: Llama) -> None:
    """All products of the network, counted by torch during a run."""
    from torch.utils.flop_counter import FlopCounterMode

    args, T = tiny.args, 16
    ids = torch.tensor([bench.random_ids(args.vocab_size, T, seed=1)])
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        Transformer(args)(ids)  # with torch's own layers
    linear = bench.prefill_flops(args, T) - bench._attention_flops(args, T * (T + 1) // 2)
    # torch counts the full T × T attention, not only its causal half.
    assert counter.get_total_flops() - linear in (0, bench._attention_flops(args, T * T))
    assert bench.decode_flops(args, 0) == bench.prefill_flops(args, 1)


def test_parameters_of_the_1b_shape() -> None:
    """Each decoded token of Llama 3.2 1B reads 1,235,746,816 weights in linear layers, without norms."""
    args = tiny_args(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256, multiple_of=256)
    norms = 2048 * 33
    assert args.linear_parameters() == args.n_parameters(tied=True) - norms == 1_235_746_816


def test_random_ids_share_no_first_token() -> None:
    """A cache cannot be reused with another seed. The same seed gives the same ids."""
    first, second = bench.random_ids(100, 5, seed=1), bench.random_ids(100, 5, seed=2)
    assert first[0] != second[0]
    assert first == bench.random_ids(100, 5, seed=1)
    assert all(0 <= id < 100 for id in first)


def test_measure_leaves_out_what_the_context_has_no_room_for(tiny: Llama) -> None:
    """The report lists these sizes, in the requested order."""
    found = bench.measure(tiny, prefill=[64, 65], decode_at=[16, 62, 63], tokens=2, runs=1)
    assert [prompt["tokens"] for prompt in found["prefill"]] == [64]
    assert [step["context"] for step in found["decode"]] == [16, 62]
    assert found["left_out"] == {"prefill": [65], "decode": [63]}
    assert "prefill 65, decode at 63 and 2 more: the context is 64 tokens" in shown(found, 200)


def test_figures_agree_with_each_other(tiny: Llama) -> None:
    """Rates, bytes and ratios are computed from the same times."""
    found = bench.measure(tiny, prefill=[8], decode_at=[16], tokens=2, runs=1)
    (prompt,), (step,) = found["prefill"], found["decode"]
    assert prompt["tokens_per_s"] == pytest.approx(8 / prompt["seconds"])
    assert found["weight_bytes"] == 4 * tiny.args.linear_parameters()
    # Keys and values: 3 layers × 2 heads × 64 float32 numbers, for 16 tokens.
    assert step["kv_bytes"] == 16 * 2 * 3 * 2 * 64 * 4
    limit = found["bandwidth"] / (found["weight_bytes"] + step["kv_bytes"])
    assert step["share_of_limit"] == pytest.approx(step["tokens_per_s"] / limit)
    assert found["peak_bytes"] > 0


FOUND: dict[str, Any] = {
    "model": {"name": "Llama3.2-1B", "precision": "fp16", "device": "cpu"},
    "threads": 2,
    "tokens": 16,
    "bandwidth": 23.9e9,
    "load_s": 1.04,
    "prepare_s": 3.3,
    "peak_bytes": 5_123_000_000,
    "weight_bytes": 2_471_493_632,
    "prefill": [{"tokens": 2048, "tokens_per_s": 1234.5, "gflops_per_s": 2345.6}],
    "decode": [
        {"context": 16, "tokens_per_s": 9.25, "share_of_limit": 0.957, "kv_bytes": 1_048_576, "flops": 2.5e9},
        {"context": 8192, "tokens_per_s": 7.5, "share_of_limit": 0.94, "kv_bytes": 536_870_912, "flops": 3.5e9},
    ],
    "left_out": {"prefill": [], "decode": []},
    "context": 131072,
}


def shown(found: dict[str, Any], width: int) -> str:
    """The table for a terminal of this width."""
    out = io.StringIO()
    Console(file=out, width=width).print(bench_table(found))
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80])
def test_the_table_fits(width: int) -> None:
    """No cell is truncated, and each speed is on one line."""
    text = shown(FOUND, width)
    assert "…" not in text
    for line in ("prefill 2,048 1,234 2,346", "decode at 16 9.2 96%", "decode at 8,192 7.5 94%"):
        assert line in {" ".join(shown_line.split()) for shown_line in text.splitlines()}


def test_lines_for_a_pipe() -> None:
    """One name and value per line."""
    lines = bench_lines(FOUND)
    assert lines["prefill 2048"] == "1,234 tokens/s, 2,346 GFLOP/s"
    assert lines["decode at 16"] == "9.2 tokens/s, 96% of the limit"
    assert lines["KV cache"] == "per token: 1.0 MB at 16, 536.9 MB at 8,192"
    assert lines["load"] == "1.0 s, then 3.3 s of preparation"


@pytest.mark.parametrize("before", [True, False])
def test_the_command_takes_model_options_on_either_side(
    before: bool, tiny_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """JSON on standard output, nothing on standard error."""
    model = ("--model-dir", str(tiny_dir), "--precision", "bf16")
    assert run([*model, "bench", *SMALL, "--json"] if before else ["bench", *model, *SMALL, "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["model"]["precision"] == "bf16"
    assert [prompt["tokens"] for prompt in found["prefill"]] == [4, 8]
    assert [step["context"] for step in found["decode"]] == [3]


def test_the_command_in_a_pipe(tiny_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`name: value` on each line."""
    assert run(["bench", "--model-dir", str(tiny_dir), *SMALL]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("prefill 4: ")
    assert all(": " in line for line in lines)


def test_the_command_on_a_terminal(
    tiny_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(["bench", "--model-dir", str(tiny_dir), *SMALL]) == 0
    assert "decode at 3 " in capfd.readouterr().out


@pytest.mark.parametrize(
    "wrong", [("--prefill", "8,x"), ("--prefill", "0"), ("--decode-at", "-1"), ("--tokens", "0"), ("--runs", "0")]
)
def test_a_wrong_size_is_one_sentence(
    wrong: tuple[str, str], tiny_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error is raised before the model is loaded."""
    assert run(["bench", "--model-dir", str(tiny_dir), *wrong]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert wrong[0] in err
