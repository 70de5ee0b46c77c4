"""Benchmarks at a tiny size, model files of peers, and the recorded report.

No times are asserted; `make benchmark` measures them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import compare, files, llama_bench, loading, microscope, quality, report, rotate
from benchmarks import kernels as kernel_speed
from benchmarks.entries import CHECKPOINT, ENTRIES, PACKAGE_OF, Entry, Plan, model_file
from benchmarks.llama_bench import LlamaBench, LlamaBenchError
from benchmarks.machine import ONLY_AVX2, features, has_more_than_avx2
from benchmarks.sections import speed_bounds as bounds_of_speed
from benchmarks.sections.figures import Figures
from benchmarks.sections.layout import AVX2
from benchmarks.sections.microscope import microscope_bounds
from benchmarks.sections.quality import quality_bounds
from benchmarks.sections.quality_rotated import rotated_bounds
from benchmarks.sections.speculation import speculation_bounds
from benchmarks.sections.speed_bounds import speed_bounds
from benchmarks.sections.startup import startup_bounds
from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.config import is_tied
from llama_scratch.precision import kernels
from llama_scratch.precision.lazy_weight import Weight, as_tensor
from llama_scratch.system.progress import silent
from tests.helpers.checkpoints import write_meta

# --- End to end -------------------------------------------------------------------------------


@pytest.mark.slow
def test_compare_at_a_tiny_size(tmp_path: Path) -> None:
    """Models are created, engines alternate in processes, and the table is written."""
    names = ["ours fp", "ours bf16", "ours int8", "ik"]  # without int4, which would be calibrated first
    compare.main(["--tiny", "--engines", *names, "--directory", str(tmp_path), "--output", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    twice = has_more_than_avx2(features())
    avx2 = {"ours bf16 (AVX2)", "ours int8 (AVX2)"} if twice else set()
    assert {"ours fp16", "ours int8", "ours bf16", "ours fp32", *avx2} == set(results["engines"])
    if twice and kernels.compiler():
        assert results["engines"]["ours int8 (AVX2)"]["kernels"] == "AVX2"
    assert results["engines"]["ours fp32"]["distance"] == 0
    assert 0 <= results["engines"]["ours bf16"]["distance"] < 1e-5
    moments = {(s["engine"], s["case"], s["round"]) for s in results["samples"]}
    assert ("ours bf16", "long", 0) in moments
    assert ("ours int8", "decode", 1) in moments
    assert len(results["edits"]) == 2
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| ours fp16 |" in table
    assert "| decode, bf16 | ≥ 0.88 × bandwidth ÷ weight bytes |" in table
    assert "- ik_llama.cpp: not measured; pass the path of its llama-bench with --ik" in table


@pytest.mark.slow
def test_an_engine_that_does_not_load_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are measured, and the report says why."""
    entries = (
        Entry("ours fp32", "ours", "fp32", CHECKPOINT),
        Entry("ours fp3", "ours", "fp3", CHECKPOINT),
    )
    monkeypatch.setattr("benchmarks.entries.ENTRIES", entries)
    options = ["--tiny", "--rounds", "1", "--cases", "decode"]
    compare.main([*options, "--directory", str(tmp_path), "--output", str(tmp_path / "out")])
    assert "- ours fp3: The precision is 'fp3'" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.slow
def test_quality_at_a_tiny_size(tmp_path: Path, tiny_dir: Path) -> None:
    """All our precisions against fp32."""
    sizes = ["--tokens", "64", "--window", "32", "--peers"]
    quality.main(["--model", str(tiny_dir), *sizes, "--output", str(tmp_path), "--directory", str(tmp_path)])
    found = json.loads((tmp_path / "quality.json").read_text())
    assert found["tokens"] == 64
    assert found["distances"]["ours fp16"]["mean_kl"] < 1e-4
    assert "| ours int8 |" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_quality_of_rotated_weights_at_a_tiny_size(tmp_path: Path, tiny_dir: Path) -> None:
    """Distances and bits of int8 and int4 with rotated weights, and errors of w2."""
    sizes = ["--tokens", "64", "--window", "32", "--peers"]
    folders = ["--output", str(tmp_path), "--directory", str(tmp_path)]
    quality.main(["--model", str(tiny_dir), "--rotate", *sizes, *folders])
    found = json.loads((tmp_path / "quality_rotated.json").read_text())
    assert found["model"] == f"{tiny_dir.name}-rotated"
    int8, int4 = found["distances"]["ours int8"], found["distances"]["ours int4"]
    assert 0 < int8["mean_kl"] < int4["mean_kl"]
    assert int4["bits"] < int8["bits"]
    assert found["perplexity"] == pytest.approx(int8["perplexity"], rel=0.1)
    assert 0 < found["w2"]["ours int8"]["weight"] < found["w2"]["ours int4"]["weight"] < 0.05
    assert "| ours int4 |" in (tmp_path / "results.md").read_text()
    assert not (tmp_path / "quality.json").exists()


@pytest.mark.slow
def test_the_microscope_at_a_tiny_size(tmp_path: Path, tiny_dir: Path) -> None:
    """The file and the table have every row."""
    sizes = ["--runs", "1", "--tokens", "4", "--record", "--output", str(tmp_path)]
    microscope.main(["--model-dir", str(tiny_dir), str(tiny_dir), *sizes])
    found = json.loads((tmp_path / "microscope.json").read_text())
    assert [model["name"] for model in found["models"]] == [tiny_dir.name] * 2
    assert set(found["models"][0]["seconds"]) == set(found["rows"])
    assert all(value > 0 for model in found["models"] for value in [*model["seconds"].values(), model["ratio"]])
    table = (tmp_path / "results.md").read_text()
    assert "| /lens, 64 tokens |" in table
    assert "| decode, hooks removed ÷ no hooks, Tiny-Llama | ≤ 1.03 |" in table


def test_bounds_of_the_microscope() -> None:
    """A model with only the bound on hooks, and one that misses one of its bounds."""
    models = [
        {"name": "Other", "seconds": {"lens": 99, "why": 99}, "ratio": 1.04},
        {"name": "Llama3.2-1B", "seconds": {"lens": 8.0, "why": 20.1}, "ratio": 1.03},
    ]
    bounds = microscope_bounds({"models": models, "rows": {"lens": "/lens", "why": "/why"}})
    assert [bound.met for bound in bounds] == [False, True, False, True]


def test_bounds_of_guesses() -> None:
    """One case that misses each bound, and the table."""
    found = {"texts": 1, "plain": 1.0, "drafts": 1.0, "compared": 9999, "differ": 0}
    kinds = {"repeats": found | {"ratio": 1.49}, "does not": found | {"ratio": 0.98}, "many": found | {"ratio": 1.0}}
    better = kinds | {"many": found | {"ratio": 1.0, "compared": 10_000}}
    worse = better | {"repeats": found | {"ratio": 1.5, "differ": 1}}
    kept: dict[str, Any] = {
        "precisions": {"int8": kinds, "int4": better, "other": worse},
        "versions": {},
        "model": "SmolLM2",
    }
    kept |= {"tokens": 192, "rounds": 3, "threads": 2}
    bounds = speculation_bounds(kept)
    assert [bound.met for bound in bounds] == [False, True, False, False, True, True, True, True, False]
    text = report.render({"speculation": kept})
    assert "| int8, many prompts, greedy | 1 | 1 | 1 | 1.00 | 9,999 | 0 |" in text


def test_the_recorded_report_is_the_rendering_of_the_recorded_numbers() -> None:
    """results.md is rendered from the recorded files, not edited by hand."""
    assert (report.FOLDER / "results.md").read_text() == report.render(report.read_recorded(report.FOLDER))


# --- Quality ----------------------------------------------------------------------------------


def test_distance_of_known_distributions() -> None:
    """KL divergence of (1/2, 1/2) from (1/4, 3/4) in nats; shifts do not matter."""
    even, uneven = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.25, 0.75]]).log() + 7
    distance = quality.Distance()
    distance.add(even.repeat(200, 1), uneven.repeat(200, 1))
    assert distance.mean_kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert distance.same_top_share == 0
    distance.add(uneven.repeat(600, 1), uneven.repeat(600, 1))
    assert distance.tokens == 800
    assert distance.same_top_share == 0.75
    assert distance.mean_kl == pytest.approx(0.25 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)))


def test_perplexity() -> None:
    """Tokens with probabilities 1/4 and 3/4: exponential of their mean surprisal."""
    uneven = torch.tensor([[0.25, 0.75]]).log().repeat(3, 1)
    distance = quality.Distance()
    distance.add(uneven, uneven, [0, 0, 1])
    assert distance.perplexity == pytest.approx((1 / 4 * 3 / 4) ** -0.5)
    long = quality.Distance()
    ids = [0, 1] * quality.ROWS
    long.add(uneven[:1].repeat(len(ids), 1), uneven[:1].repeat(len(ids), 1), ids)
    assert long.perplexity == pytest.approx(
        math.exp(-(math.log(0.25) * (quality.ROWS - 1) + math.log(0.75) * quality.ROWS) / (len(ids) - 1))
    )


@pytest.mark.parametrize("tied", [True, False])
def test_rotated_weights_are_the_same_network(tmp_path: Path, tied: bool) -> None:
    """The logits are equal up to rounding; all weights differ; norm weights are 1."""
    source = Llama.load(write_meta(tmp_path / "source", tied=tied), precision="fp32")
    rotate.make_rotated(tmp_path / "source", tmp_path / "rotated.gguf")
    turned = Llama.load(tmp_path / "rotated.gguf", precision="fp32")
    ids = list(range(100, 150))
    expected, found = source.logits(ids), turned.logits(ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    before, after = source.engine.model.state_dict(), turned.engine.model.state_dict()
    assert before.keys() == after.keys()
    for name, weight in after.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert float((weight - before[name]).norm() / before[name].norm()) > 0.5, name


def test_a_rotation_that_changes_answers_is_no_rotation(
    tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark would measure a different network."""
    whole = rotate.rotated

    def wrong(weights: Mapping[str, Weight], layers: int) -> dict[str, Tensor]:
        turned = whole(weights, layers)
        turned["layers.0.attention.wo.weight"] *= 1.01
        return turned

    monkeypatch.setattr(rotate, "rotated", wrong)
    with pytest.raises(SystemExit, match="are off by"):
        rotate.make_rotated(tiny_dir, tmp_path / "rotated.gguf")


def test_windows() -> None:
    """Only complete windows, with at least the requested tokens if possible."""
    assert quality.windows(range(100), 30, 50) == [range(30), range(30, 60)]
    assert len(quality.windows(range(100), 30, 1000)) == 3


def test_the_text_is_long_enough() -> None:
    """At least 20,000 English tokens, with fewer than 6 characters on average."""
    assert len(quality.text()) > 6 * 20_480


# --- The peers' files -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_in_one_type(tmp_path: Path, smollm2_path: Path, dtype: torch.dtype) -> None:
    """SmolLM2's matrices in another dtype, each rounded once."""
    files.make_gguf(smollm2_path, tmp_path / "again.gguf", dtype)
    before, after = open_checkpoint(smollm2_path), open_checkpoint(tmp_path / "again.gguf")
    assert after.args == before.args
    old, new = before.load(silent), after.load(silent)
    assert is_tied(new)
    for name, weight in old.items():
        expected = as_tensor(weight)
        assert torch.equal(as_tensor(new[name]), expected if expected.dim() == 1 else expected.to(dtype)), name


@pytest.mark.parametrize("count", [2, 4])
def test_shards_are_the_same_model(tmp_path: Path, tiny_dir: Path, count: int) -> None:
    """The right number of files, and the same weights."""
    files.make_shards(tiny_dir, tmp_path / "shards", count)
    assert len(list((tmp_path / "shards").glob("*.pth"))) == count
    whole, joined = open_checkpoint(tiny_dir).load(silent), open_checkpoint(tmp_path / "shards").load(silent)
    assert whole.keys() == joined.keys()
    assert all(torch.equal(as_tensor(whole[name]), as_tensor(joined[name])) for name in whole)


@pytest.mark.slow
def test_the_kernels_at_a_tiny_size(tmp_path: Path) -> None:
    """Each instruction set gives the same results and is in the table."""
    if kernels.compiler() is None:
        pytest.skip("no C++ compiler")
    kinds = ("int8", "int4", "bf16", "Q4_1")
    cases = [kernel_speed.Case(kind, rows, 32, 128, 2) for kind in kinds for rows in (1, 3)]
    recorded = kernel_speed.measure_all(cases, tmp_path, rounds=1)
    assert recorded["same_bits"]
    sets = list(recorded["cases"][0]["seconds"])
    assert "any machine" in sets
    assert all(seconds > 0 for case in recorded["cases"] for seconds in case["seconds"].values())
    assert recorded["cases"][0]["weight_bytes"] == 32 * 128 + 2 * 32 * 128 // 32
    text = report.render({"kernels": recorded})
    assert f"| product | weight | {' | '.join(sets)} |" in text
    assert "| int8, 3 rows | 32 × 128 |" in text
    flags = [flag for flag in kernels._flags() if flag.endswith("=native")]
    product = kernel_speed.Product(tmp_path, "native", flags)
    *_, [y] = kernel_speed.measure([product], cases[1], rounds=1)
    assert y.abs().sum() > 0


@pytest.mark.slow
def test_loading_at_a_tiny_size(tmp_path: Path) -> None:
    """Every file format, and the table."""
    out = ["--directory", str(tmp_path), "--output", str(tmp_path)]
    loading.main(["--tiny", "--rounds", "1", "--precisions", "int8", *out])
    rows = json.loads((tmp_path / "loading.json").read_text())["rows"]
    assert len(rows) == 5
    assert all(0 < row["loaded_s"] < row["answered_s"] < row["prepared_s"] for row in rows)
    assert "| GGUF F16, int8 |" in (tmp_path / "results.md").read_text()


def test_the_hugging_face_directory_is_the_same_model(tmp_path: Path, tiny_dir: Path) -> None:
    """transformers computes the same logits as this package."""
    from transformers import AutoModelForCausalLM

    files.make_huggingface(tiny_dir, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.randint(556, (64,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    found = Llama.load(tiny_dir, precision="fp32").logits(ids.tolist())
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_an_interrupted_file_is_made_again(tmp_path: Path) -> None:
    """A partial file is not used as the complete one."""

    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.once(tmp_path / "x", interrupted)
    assert not (tmp_path / "x").exists()
    files.once(tmp_path / "x", lambda path: print(path.write_text("whole")))
    assert (tmp_path / "x").read_text() == "whole"


# --- The report -------------------------------------------------------------------------------


def sample(engine: str, case: str, round: int, prefill_s: float, decode_s: float = 0.0) -> dict[str, Any]:
    """One measurement in a round with 20 GB/s of bandwidth."""
    return {
        "group": 1,
        "round": round,
        "case": case,
        "engine": engine,
        "bandwidth": 20e9,
        "others_cpu": 0.01,
        "prefill_s": prefill_s,
        "decode_s": decode_s,
    }


def engine(weight_bytes: float, anonymous_bytes: float) -> dict[str, Any]:
    """An engine of the 1B model."""
    return {
        "model": "1B",
        "load_s": 1.0,
        "prepare_s": 2.0,
        "weight_bytes": int(weight_bytes),
        "anonymous_bytes": int(anonymous_bytes),
        "file_bytes": 1,
        "kernels": "",
        "distance": None,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """Two rounds on a CPU with AVX2; the machine is half as fast in the second."""
    samples = []
    for round, slow in enumerate((1, 2)):
        samples += [
            sample("ours bf16", "prefill 100", round, slow * 1.0),
            sample("ours int8", "prefill 100", round, slow * 0.5),
            sample("ik_llama.cpp Q8_0", "prefill 100", round, slow * 0.55),
            sample("llama.cpp BF16", "prefill 100", round, slow * 2.0),
            sample("llama.cpp BF16 flash", "prefill 100", round, slow * 1.25),
            sample("llama.cpp F16", "prefill 100", round, slow * 1.5),
            sample("ours bf16", "decode", round, 1.0, slow * 1.0),
            sample("ours int8", "decode", round, 1.0, slow * 0.8),
            sample("ik_llama.cpp Q8_0", "decode", round, 0.0, slow * 0.7),
            sample("llama.cpp BF16", "decode", round, 1.0, slow * 1.5),
        ]
    names = ("llama.cpp BF16", "llama.cpp BF16 flash", "llama.cpp F16")
    return {
        "model": {"name": "Hand-made", "parameters": 1_000_000, "layers": 2, "dim": 64},
        "machine": {
            "cpu": "C",
            "features": ["avx2"],
            "cores": 2,
            "threads": 2,
            "memory_bytes": 8e9,
            "system": "S",
            "kernels": "AVX2",
        },
        "versions": {"torch": "2.13.0"},
        "reference": "llama.cpp BF16",
        "rounds": 2,
        "long_rounds": 0,
        "cases": {
            "prefill 100": {"model": "1B", "context": 100, "tokens": 0, "long": False},
            "decode": {"model": "1B", "context": 16, "tokens": 10, "long": False},
        },
        "engines": {
            "ours bf16": engine(1.9e9, 0.39e9),
            "ours int8": engine(1e9, 1.6e9),
            "ik_llama.cpp Q8_0": engine(1e9, 0) | {"load_s": None},
            **{name: engine(2e9, 1e9) for name in names},
        },
        "samples": samples,
        "edits": [{"engine": "ours bf16", "tokens": 1000, "whole_s": 10.0, "edited_s": 0.1}],
        "left_out": {},
    }


def on_avx512(results: dict[str, Any]) -> dict[str, Any]:
    """The same run on a CPU with AVX-512, with our int8 also measured with AVX2."""
    machine = results["machine"] | {"features": ["avx2", "avx512f"], "kernels": "AVX-512 VNNI"}
    avx2 = {"ours bf16 (AVX2)": engine(2e9, 1e9), "ours int8 (AVX2)": engine(1e9, 1e9) | {"kernels": "AVX2"}}
    engines = results["engines"] | avx2
    again = [
        sample | {"engine": "ours int8 (AVX2)"} for sample in results["samples"] if sample["engine"] == "ours int8"
    ]
    return results | {"machine": machine, "engines": engines, "samples": results["samples"] + again}


def verdicts(results: dict[str, Any]) -> dict[str, str]:
    """Each bound and its verdict."""
    return {bound.what + ": " + bound.expected: bound.verdict for bound in speed_bounds(results)}


def test_medians_and_ratios(results: dict[str, Any]) -> None:
    """A slow round lowers the median rate but not the ratios; the fastest peer counts."""
    figures = Figures(results)
    assert figures.rate("prefill", "prefill 100", "ours bf16") == 75.0
    ratio = figures.ratio("prefill", "prefill 100", ["ours bf16"], bounds_of_speed.BF16)
    assert ratio == pytest.approx(1.25)
    assert figures.ratio("decode", "decode", ["ours bf16"], ["nobody"]) is None
    # 10 and 5 tokens per second, 1.9 GB per token, 20 GB/s.
    assert figures.share("decode", "ours bf16") == pytest.approx((0.95 + 0.475) / 2)


_PEERS = "llama.cpp's best of BF16, Q8_0, Q4_0, Q4_K_M"


def test_bounds_on_avx2(results: dict[str, Any]) -> None:
    """Each bound that has figures in the run, once."""
    assert verdicts(results) == {
        "prefill of 100, bf16: ≥ 1.3 × llama.cpp's best of BF16, F16, Q8_0": "**not met**",
        f"prefill of 100, int8: ≥ 1.5 × {_PEERS}": "met",
        "prefill of 100, int8: ≥ 1.7 × the same": "met",
        "prefill of 100, int8: ≥ 1 × ik_llama.cpp Q8_0, repacked": "met",
        "decode, bf16: ≥ 1 × llama.cpp BF16": "met",
        "decode, bf16: ≥ 0.88 × bandwidth ÷ weight bytes": "**not met**",
        "decode, bf16: ≥ 0.92 × the same": "target missed",
        "decode, int8: ≥ 0.92 × bandwidth ÷ weight bytes": "**not met**",
        "decode, int8: ≥ 1 × ik_llama.cpp Q8_0, repacked": "**not met**",
        "prompt of 1,000 tokens, last token changed: ≤ 1/50 of the full prefill": "met",
        "private memory, bf16: ≤ 0.40 GB": "met",
        "private memory, int8: ≤ 1.55 GB": "**not met**",
    }


def test_bounds_on_avx512(results: dict[str, Any]) -> None:
    """Ratios to ik_llama.cpp and ratios of the AVX2 rows have no verdict."""
    found = verdicts(on_avx512(results))
    assert found["prefill of 100, bf16: ≥ 1 × llama.cpp's best of BF16, F16, Q8_0"] == "met"
    assert found[f"prefill of 100, int8: ≥ 1.6 × {_PEERS}"] == "met"
    assert "prefill of 100, int8: ≥ 1.7 × the same" not in found
    assert {what for what, verdict in found.items() if verdict == "informational"} == {
        "prefill of 100, int8: target ≥ 1 × ik_llama.cpp Q8_0, repacked",
        "decode, int8: target ≥ 1 × ik_llama.cpp Q8_0, repacked",
        f"prefill of 100, int8 (AVX2): × {_PEERS}",
        "prefill of 100, int8 (AVX2): × ik_llama.cpp Q8_0, repacked",
        "decode, int8 (AVX2): × bandwidth ÷ weight bytes",
        "decode, int8 (AVX2): × ik_llama.cpp Q8_0, repacked",
    }


def test_bounds_on_another_cpu(results: dict[str, Any]) -> None:
    """Ratios have no verdict if the CPU has no bounds."""
    results["machine"]["features"] = ["asimddp"]
    assert {what.split(":")[0] for what, verdict in verdicts(results).items() if verdict != "informational"} == {
        "prompt of 1,000 tokens, last token changed",
        "private memory, bf16",
        "private memory, int8",
    }


@pytest.mark.parametrize(("extra", "found"), [("", ["**not met**"]), (" (AVX2)", ["informational"])])
def test_bounds_of_a_small_model(results: dict[str, Any], extra: str, found: list[str]) -> None:
    """SmolLM2's best precision against llama.cpp's best.

    AVX2 rows do not count on a CPU with AVX-512.
    """
    results["machine"]["features"].append("avx512f")
    results["cases"]["SmolLM2"] = {"model": "SmolLM2", "context": 16, "tokens": 10, "long": False}
    for name, seconds in ((f"SmolLM2 ours int4{extra}", 1.0), ("SmolLM2 llama.cpp Q4_0", 1.9)):
        results["engines"][name] = engine(1e8, 1e8) | {"model": "SmolLM2"}
        results["samples"].append(sample(name, "SmolLM2", 0, 1.0, seconds))
    bounds = [bound for bound in speed_bounds(results) if bound.what.startswith("SmolLM2")]
    assert [bound.verdict for bound in bounds] == found


@pytest.mark.parametrize(("answer", "met"), [(1.9, True), (1.91, False)])
def test_bounds_of_the_start(answer: float, met: bool) -> None:
    """The large model may take 0.9 s more than importing torch."""
    seconds = {"prompt": 0.2, "torch": 1.0, "answer": answer}
    bounds = startup_bounds({"model": "Llama3.2-1B", "seconds": seconds})
    assert [bound.met for bound in bounds if "answer" in bound.what] == [met]


def test_bounds_of_quality() -> None:
    """int8 is compared with llama.cpp's Q8_0, fp16 with fixed limits."""
    distances = {
        "ours fp16": {"mean_kl": 2e-5, "same_top": 0.999},
        "ours int8": {"mean_kl": 5.8e-3, "same_top": 0.955},
        "llama.cpp Q8_0": {"mean_kl": 5.6e-3, "same_top": 0.959},
    }
    verdicts = [bound.met for bound in quality_bounds({"distances": distances})]
    assert verdicts == [False, True, True, False]


def test_bounds_of_rotated_quality() -> None:
    """int8 is compared with Q8_0 and int4 with Q4_0, both by distance and by size."""
    distances = {
        "ours int8": {"mean_kl": 3e-3, "bits": 8.5},
        "ours int4": {"mean_kl": 0.41, "bits": 4.25},
        "llama.cpp Q8_0": {"mean_kl": 3.5e-3, "bits": 8.5},
        "llama.cpp Q4_0": {"mean_kl": 0.5, "bits": 4.2},
    }
    verdicts = [bound.met for bound in rotated_bounds({"distances": distances})]
    assert verdicts == [True, True, False, False]
    distances["ours int4"] = {"mean_kl": 0.39, "bits": 4.1}
    assert all(bound.met for bound in rotated_bounds({"distances": distances}))


def test_the_report_is_markdown(results: dict[str, Any]) -> None:
    """All lines of a table have the same number of columns."""
    text = report.render({"results": results})
    assert "| ours bf16 | 75.0 (2.00) |" in text
    assert "## Quality" not in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_each_table_names_its_cpu(results: dict[str, Any]) -> None:
    """The line above a table names the CPU and the kernels' instruction sets."""
    text = report.render({"results": on_avx512(results)})
    blocks = text.split("\n\n")
    tables = [i for i, block in enumerate(blocks) if block.startswith("|")]
    assert len(tables) == 3
    caption = "CPU: C (avx2, avx512f). Our kernels: AVX-512 VNNI; in rows marked (AVX2): AVX2."
    assert {blocks[i - 1] for i in tables} == {caption}


def test_each_recorded_table_has_a_caption() -> None:
    """Every table of the recorded report has a line that names the CPU."""
    blocks = (report.FOLDER / "results.md").read_text().split("\n\n")
    assert all(before.startswith("CPU: ") for before, block in pairwise(blocks) if block[0] == "|")


@pytest.mark.parametrize("suffix", ["", AVX2])
@pytest.mark.parametrize(
    ("precision", "peers"),
    [
        ("bf16", (*bounds_of_speed.BF16, *bounds_of_speed.F16, *bounds_of_speed.Q8_0)),
        (
            "int8",
            (
                *bounds_of_speed.BF16,
                *bounds_of_speed.Q8_0,
                *bounds_of_speed.Q4_0,
                *bounds_of_speed.Q4_K_M,
                *bounds_of_speed.IK_Q8_0,
            ),
        ),
        (
            "int4",
            (
                *bounds_of_speed.BF16,
                *bounds_of_speed.Q8_0,
                *bounds_of_speed.Q4_0,
                *bounds_of_speed.Q4_K_M,
                *bounds_of_speed.IK_Q4_K_M,
            ),
        ),
    ],
)
def test_engines_take_turns_with_their_peers(precision: str, peers: tuple[str, ...], suffix: str) -> None:
    """Ratios are computed within a round, so both engines must be in the same group."""
    entries = {entry.name: entry for entry in ENTRIES}
    ours = entries[f"ours {precision}{suffix}"]
    assert ours.avx2 == bool(suffix)
    assert all(ours.groups[0] in entries[peer].groups for peer in peers)


def test_the_limits_to_avx2_are_those_of_the_tests() -> None:
    """`make instruction-sets` and the benchmark limit the same libraries."""
    makefile = (report.FOLDER.parent / "Makefile").read_text()
    line = next(line for line in makefile.splitlines() if line.startswith("ONLY_AVX2 = "))
    limits = dict(word.split("=") for word in line.removeprefix("ONLY_AVX2 = ").split())
    assert limits | {"LLAMA_SCRATCH_KERNELS": "avx2"} == ONLY_AVX2


# --- ik_llama.cpp -----------------------------------------------------------------------------

_STAND_IN = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + chr(10))
{body}
"""
_FIGURES = """
value = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("[")
print("===== Repacked 113 tensors")
print("  {")
print('    "build_commit": "abc1234", "build_number": 7, "n_prompt": %s,' % value["-p"])
print('    "avg_ns": 250000000, "samples_ns": [ 250000000 ]')
print("  }")
print("]")
"""


def stand_in(folder: Path, body: str) -> Path:
    """Write a stand-in for llama-bench that appends its arguments to calls.log."""
    program = folder / "llama-bench"
    program.write_text(_STAND_IN.format(python=sys.executable, log=str(folder / "calls.log"), body=body))
    program.chmod(0o755)
    return program


def test_llama_bench_is_asked_for_repacked_weights(tmp_path: Path) -> None:
    """A prompt or a decode, its number of repetitions, and the reported time."""
    bench = LlamaBench(stand_in(tmp_path, _FIGURES), tmp_path / "m.gguf", threads=2)
    assert bench.version() == "abc1234"
    assert bench.seconds(prompt=128, new=0) == 0.25
    assert bench.seconds(prompt=0, new=16) == 0.25
    usual = ["-m", str(tmp_path / "m.gguf"), "-t", "2", "-rtr", "1"]
    calls = [json.loads(line) for line in (tmp_path / "calls.log").read_text().splitlines()]
    sizes = (("1", "0"), ("128", "0"), ("0", "16"))
    assert calls == [[*usual, "-p", prompt, "-n", new, "-r", "2", "-o", "json"] for prompt, new in sizes]


FAILURES = {
    "fails": ("sys.exit('llama_bench: error: failed to load model')", "exit code 1: llama_bench: error: failed to"),
    "says nothing": ("sys.exit(3)", "exit code 3: it wrote no message"),
    "prints no JSON": ("print('usage: {-m} [x]')", "did not print figures in JSON. Build the target llama-bench"),
    "prints other JSON": ("print('{\"avg_ns\": 0}')", "did not print figures in JSON"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_llama_bench_that_does_not_work_is_a_message(tmp_path: Path, kind: str) -> None:
    """The message says what happened."""
    body, message = FAILURES[kind]
    bench = LlamaBench(stand_in(tmp_path, body), tmp_path / "m.gguf", threads=2)
    with pytest.raises(LlamaBenchError) as caught:
        bench.version()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_llama_bench_that_hangs_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_bench, "PATIENCE_S", 0.2)
    bench = LlamaBench(stand_in(tmp_path, "import time; time.sleep(60)"), tmp_path / "m.gguf", threads=2)
    with pytest.raises(LlamaBenchError, match="took more than"):
        bench.version()


@pytest.mark.parametrize("name", ["missing", "a folder", "a text", "no program"])
def test_a_wrong_path_ends_the_command(tmp_path: Path, name: str) -> None:
    """It ends before anything is measured, with a message that says what to do."""
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a text").write_text("text")
    (tmp_path / "no program").write_bytes(b"\x00")
    options = ["--tiny", "--engines", "ik", "--ik", str(tmp_path / name), "--directory", str(tmp_path / "models")]
    with pytest.raises(SystemExit, match=r"is not a program\. Build the target llama-bench"):
        compare.main([*options, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_executable_format(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_bytes(b"\x00\x01")
    program.chmod(0o755)
    with pytest.raises(LlamaBenchError, match="could not be started"):
        LlamaBench(program, tmp_path / "m.gguf", threads=1).version()


@pytest.mark.slow
def test_ik_llama_cpp_takes_turns_with_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs once per round and case, and the report has its figures and its version."""
    monkeypatch.setitem(PACKAGE_OF, "ik_llama.cpp", "llama_scratch")
    monkeypatch.setattr(compare, "model_file", without_quantizer(model_file))
    folders = ["--directory", str(tmp_path), "--output", str(tmp_path / "out")]
    program = str(stand_in(tmp_path, _FIGURES))
    compare.main(["--tiny", "--engines", "ours fp32", "ik_llama.cpp Q8_0", "--rounds", "1", "--ik", program, *folders])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["versions"]["ik_llama.cpp"] == "abc1234"
    assert results["left_out"] == {}
    assert results["engines"]["ik_llama.cpp Q8_0"]["weight_bytes"] > 0
    theirs = {s["case"]: s for s in results["samples"] if s["engine"] == "ik_llama.cpp Q8_0"}
    assert set(theirs) == {"prefill 8", "prefill 16", "decode"}
    assert theirs["prefill 8"]["prefill_s"] == theirs["decode"]["decode_s"] == 0.25
    assert "| ik_llama.cpp Q8_0 | 32.0 | 64.0 | – | 16.0 |" in (tmp_path / "out" / "results.md").read_text()


def without_quantizer(whole: Callable[..., Path]) -> Callable[..., Path]:
    """`model_file` without llama.cpp's quantizer: all GGUF files are bfloat16."""

    def made(directory: Path, entry: Entry, plan: Plan) -> Path:
        return whole(directory, replace(entry, file="1B-BF16.gguf"), plan)

    return made
