"""The same prompt, seed, precision and threads give the same bytes.

Checked in a pipe, in a session and in the library.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from llama_scratch.download.pypi import pull
from llama_scratch.inference.engine import Engine
from llama_scratch.llama import Llama
from llama_scratch.precision import PRECISIONS, kernels
from llama_scratch.results import as_json
from llama_scratch.sampling import Sampling
from llama_scratch.system.progress import silent
from tests.helpers.terminal import PROGRAM, Terminal
from tests.trust.record import write

PROMPTS = ("The capital of France is", "Once upon a time", "def f(x):", "1 + 1 =", "caf\u00e9 \U0001f389")
SAMPLING = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=7)
OPTIONS = ("--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "7")
LINES = PROMPTS * 2


def pipe(model: str, precision: str, *options: str, threads: int = 1) -> list[str]:
    """Output lines of the command line for `LINES`, without times.

    Args:
        model: Path of the model.
        precision: The precision.
        options: More options.
        threads: Number of threads.
    """
    ran = subprocess.run(
        [*PROGRAM, "--model-dir", model, "--precision", precision, "--threads", str(threads), "--quiet", *options],
        input="\n".join(LINES) + "\n",
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    lines = ran.stdout.splitlines()
    return [json.dumps(without_times(json.loads(line))) for line in lines] if "--json" in options else lines


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    """Remove the times from the JSON object of an answer; token counts stay."""
    tokens = {name: value for name, value in answer["timing"].items() if not name.endswith("_s")}
    return answer | {"timing": tokens}


def library(model: str, precision: str) -> tuple[list[str], list[str]]:
    """Answers of a newly loaded model to `LINES` as JSON, and logits' hashes."""
    llama = Llama.load(model, precision=precision)
    answers, hashes = [], []
    for line in LINES:
        prediction = llama.predict(line)
        generated = llama.complete([token.id for token in prediction.tokens], 8, SAMPLING)
        answers.append(json.dumps(without_times(as_json(prediction, generated))))
        hashes.append(hashlib.sha256(llama.logits(line).numpy().tobytes()).hexdigest())
    llama.close()
    return answers, hashes


def session(model: str, precision: str, folder: Path) -> str:
    """Screen of a session after two prompts and a continuation, without times."""
    options = ("--model-dir", model, "--precision", precision, "--threads", "1", "--no-live", *OPTIONS)
    with Terminal(*options, rows=60, env={"XDG_STATE_HOME": str(folder)}) as terminal:
        terminal.wait_for("lists the commands")
        terminal.settle(0.5)
        while "Packing" in terminal.text:
            terminal.read()
        for line in PROMPTS[:2]:
            terminal.command(line, "entropy")
        terminal.command("/generate 12", "…")
        terminal.settle(0.5)
        return re.sub(r"[\d,]+ ms", "", terminal.text)


def after_reuse(model: str, precision: str = "fp32") -> float:
    """Largest relative L2 distance of logits from a cold run after cache hits.

    Covers prefix cache hits of every length.
    """
    llama = Llama.load(model, precision=precision)
    llama.prepare()
    texts = [llama.encode(text) for text in PROMPTS]
    texts += [[*a, *b] for a, b in pairwise(texts)]

    def cold(ids: Sequence[int]) -> torch.Tensor:
        return Engine(llama.engine.model, llama.context, llama.engine.packing).next_logits(ids).values

    worst = 0.0
    for ids in texts:
        for length in range(1, len(ids) + 1):  # token by token, then rewind and continue in chunks
            found, fresh = llama.engine.next_logits(ids[:length]).values, cold(ids[:length])
            worst = max(worst, float((found - fresh).norm() / fresh.norm()))
        for length in (1, len(ids) // 2 or 1, len(ids)):
            found, fresh = llama.engine.next_logits(ids[:length]).values, cold(ids[:length])
            worst = max(worst, float((found - fresh).norm() / fresh.norm()))
    return worst


def main(processes: int = 20) -> int:
    """Count the different outputs of repeated runs on SmolLM2, and record them.

    int8 runs in `processes` processes because its weights are packed in the background, the other precisions in a
    quarter of them. Returns 1 if outputs differ.
    """
    started = time.monotonic()
    kernels.build()  # otherwise the first processes would run without kernels
    model = str(pull("smollm2", silent)[0].path)
    outputs: dict[str, int] = {}
    torch.set_num_threads(1)
    for precision in PRECISIONS:
        runs = processes if precision == "int8" else processes // 4
        for name, options in (
            ("text", ("--top", "5")),
            ("json", ("--json", "--generate", "8", *OPTIONS)),
        ):
            found = {"\n".join(pipe(model, precision, *options)) for _ in range(runs)}
            outputs[f"{precision}, pipe, {name}"] = len(found)
            print(f"{precision}, pipe, {name}: {len(found)}", file=sys.stderr)
        found = {"\n".join(chain(*library(model, precision))) for _ in range(max(3, processes // 4))}
        outputs[f"{precision}, library"] = len(found)
        print(f"{precision}, library: {len(found)}", file=sys.stderr)
    with TemporaryDirectory() as folder:
        found = {session(model, "int8", Path(folder)) for _ in range(max(3, processes // 4))}
    outputs["int8, session"] = len(found)
    one, two = (pipe(model, "fp32", "--json", threads=threads) for threads in (1, 2))
    reused, in_panels = after_reuse(model), after_reuse(model, "int8")
    figures = {
        "processes": processes,
        "different_outputs": outputs,
        "after_prefix_reuse": reused,
        "after_prefix_reuse_int8": in_panels,
        "kernels": kernels.ready(),
        "other_threads_differ": one != two,
        "seconds": round(time.monotonic() - started),
    }
    write("determinism", figures)
    print(json.dumps(figures, indent=2))
    return 0 if set(outputs.values()) == {1} and reused <= 1e-5 and in_panels == 0 else 1
