"""Engines, sizes and model files for `benchmarks.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import make_ctranslate2, make_gguf, make_huggingface, once, quantize_gguf
from benchmarks.machine import features, has_more_than_avx2
from benchmarks.make_checkpoint import LLAMA_3_2_1B, make_checkpoint
from benchmarks.sections.layout import AVX2
from llama_scratch.download.locate import find_model
from llama_scratch.inference.speed import BANDWIDTH_BYTES

REFERENCE = "llama.cpp BF16"  # baseline of the speed ratios
GROUND_TRUTH = "ours fp32"  # baseline of the distances of logits
CHECKPOINT = "Llama3.2-1B"
PACKAGE_OF = {
    "ours": "llama_scratch",
    "llama.cpp": "llama_cpp",
    "ik_llama.cpp": "llama_cpp",  # llama-cpp-python writes its model files
    "ctranslate2": "ctranslate2",
    "transformers": "transformers",
}
# With default settings, idle OpenMP threads go to sleep within this time.
SETTLE_S = 0.3


@dataclass(frozen=True)
class Entry:
    """An engine with a model.

    Args:
        name: Name in the report.
        kind: The program, a key of `PACKAGE_OF`.
        variant: The precision, or the type of the weights.
        file: File name of the model.
        groups: Groups that include the engine. All engines of a group are loaded at the same time. In groups
            after the first one, the engine is measured only for comparison.
        model: Name of the model.
        flash: Whether flash attention is on.
        long: Whether the long case is measured too.
        avx2: Whether the process is limited to AVX2.
    """

    name: str
    kind: str
    variant: str
    file: str
    groups: tuple[int, ...] = (1,)
    model: str = "1B"
    flash: bool = False
    long: bool = False
    avx2: bool = False


# Groups with the 8-bit and 4-bit peers. Our panels for AVX2 are in separate files, so they need additional memory.
PEER_GROUPS = (1, 4)

ENTRIES = (
    Entry("ours bf16", "ours", "bf16", CHECKPOINT, long=True),
    Entry("ours int8", "ours", "int8", CHECKPOINT, long=True),
    Entry("ours int4", "ours", "int4", CHECKPOINT, long=True),
    Entry(f"ours bf16{AVX2}", "ours", "bf16", CHECKPOINT, long=True, avx2=True),
    Entry(f"ours int8{AVX2}", "ours", "int8", CHECKPOINT, groups=(4,), avx2=True),
    Entry(f"ours int4{AVX2}", "ours", "int4", CHECKPOINT, groups=(4,), avx2=True),
    Entry(REFERENCE, "llama.cpp", "BF16", "1B-BF16.gguf", groups=(1, 2, 4), long=True),
    Entry("llama.cpp BF16 flash", "llama.cpp", "BF16", "1B-BF16.gguf", PEER_GROUPS, flash=True, long=True),
    Entry("llama.cpp F16", "llama.cpp", "F16", "1B-F16.gguf"),
    Entry("llama.cpp Q8_0", "llama.cpp", "Q8_0", "1B-Q8_0.gguf", PEER_GROUPS),
    Entry("llama.cpp Q8_0 flash", "llama.cpp", "Q8_0", "1B-Q8_0.gguf", PEER_GROUPS, flash=True, long=True),
    Entry("llama.cpp Q4_0", "llama.cpp", "Q4_0", "1B-Q4_0.gguf", PEER_GROUPS),
    Entry("llama.cpp Q4_K_M", "llama.cpp", "Q4_K_M", "1B-Q4_K_M.gguf", PEER_GROUPS),
    Entry("ik_llama.cpp Q8_0", "ik_llama.cpp", "Q8_0", "1B-Q8_0.gguf", PEER_GROUPS),
    Entry("ik_llama.cpp Q4_K_M", "ik_llama.cpp", "Q4_K_M", "1B-Q4_K_M.gguf", PEER_GROUPS),
    Entry("CTranslate2 int8", "ctranslate2", "int8", "ctranslate2-int8", groups=(2,)),
    # The engines that need the most memory run in a group with only the reference.
    Entry("ours fp16", "ours", "fp16", CHECKPOINT, groups=(2,)),
    Entry(GROUND_TRUTH, "ours", "fp32", CHECKPOINT, groups=(2,)),
    Entry("transformers bf16", "transformers", "bf16", "hf", groups=(2,)),
    Entry("transformers fp32", "transformers", "fp32", "hf", groups=(2,)),
    Entry("SmolLM2 ours fp16", "ours", "fp16", "smollm2", groups=(3,), model="SmolLM2"),
    Entry("SmolLM2 ours int8", "ours", "int8", "smollm2", groups=(3,), model="SmolLM2"),
    Entry("SmolLM2 ours int4", "ours", "int4", "smollm2", groups=(3,), model="SmolLM2"),
    Entry(f"SmolLM2 ours int8{AVX2}", "ours", "int8", "smollm2", groups=(3,), model="SmolLM2", avx2=True),
    Entry(f"SmolLM2 ours int4{AVX2}", "ours", "int4", "smollm2", groups=(3,), model="SmolLM2", avx2=True),
    Entry("SmolLM2 llama.cpp Q8_0", "llama.cpp", "Q8_0", "SmolLM2-135M-Instruct-Q8_0.gguf", (3,), "SmolLM2"),
    Entry("SmolLM2 llama.cpp Q4_0", "llama.cpp", "Q4_0", "SmolLM2-135M-Instruct-Q4_0.gguf", (3,), "SmolLM2"),
)


def selected(names: Sequence[str], left_out: Sequence[str] = ()) -> list[Entry]:
    """Select the entries of a run.

    Args:
        names: Name prefixes; all entries if empty.
        left_out: Full names of entries to skip.

    Returns:
        The entries. Those limited to AVX2 are included only if our kernels can use more than AVX2 on this CPU.
    """
    twice = has_more_than_avx2(features())
    entries = [entry for entry in ENTRIES if (twice or not entry.avx2) and entry.name not in left_out]
    return [entry for entry in entries if not names or any(entry.name.startswith(name) for name in names)]


# --- Sizes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Sizes of one run."""

    params: dict[str, Any]
    prefill: tuple[int, ...]
    decode_at: int
    long: int
    edit: int
    tokens: int
    bandwidth_bytes: int
    settle_s: float

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        """The cases by name: a prompt of `context` tokens, and `tokens` decoded after it."""
        return {
            **{f"prefill {n}": _case("1B", n, 0) for n in self.prefill},
            "decode": _case("1B", self.decode_at, self.tokens),
            "long": _case("1B", self.long, self.tokens // 2, long=True),
            "SmolLM2": _case("SmolLM2", self.decode_at, 2 * self.tokens),
        }


def _case(model: str, context: int, tokens: int, *, long: bool = False) -> dict[str, Any]:
    return {"model": model, "context": context, "tokens": tokens, "long": long}


FULL = Plan(LLAMA_3_2_1B, (128, 512), 16, 8192, 1000, 32, BANDWIDTH_BYTES, SETTLE_S)
TINY = Plan(
    LLAMA_3_2_1B | {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32},
    prefill=(8, 16),
    decode_at=4,
    long=64,
    edit=32,
    tokens=4,
    bandwidth_bytes=16_000_000,
    settle_s=0.0,
)


# --- Model files ------------------------------------------------------------------------------


def model_file(directory: Path, entry: Entry, plan: Plan) -> Path:
    """Return the path of an entry's model. Create the model if it does not exist.

    Args:
        directory: Folder of the model files.
        entry: The entry.
        plan: Sizes of the model.
    """
    if entry.model == "SmolLM2":
        return _smollm2_file(directory, entry)
    checkpoint = once(directory / CHECKPOINT, partial(make_checkpoint, params=plan.params))
    path = directory / entry.file
    match entry.kind:
        case "llama.cpp" | "ik_llama.cpp":
            bf16 = once(directory / "1B-BF16.gguf", lambda target: make_gguf(checkpoint, target, torch.bfloat16))
            once(path, lambda target: quantize_gguf(bf16, target, entry.variant))
        case "transformers" | "ctranslate2":
            huggingface = once(directory / "hf", lambda target: make_huggingface(checkpoint, target))
            once(path, lambda target: make_ctranslate2(huggingface, target))
    return path


def _smollm2_file(directory: Path, entry: Entry) -> Path:
    source = find_model("smollm2")
    if entry.kind == "ours":
        return source
    f32 = directory / "SmolLM2-135M-Instruct-F32.gguf"
    once(f32, lambda target: make_gguf(source, target, torch.float32))
    return once(directory / entry.file, lambda target: quantize_gguf(f32, target, entry.variant))
