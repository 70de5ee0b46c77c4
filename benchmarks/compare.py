"""Us and the peers on the same random-weight model of Llama 3.2 1B's shape, taking turns in one run.

    make benchmark        (python -m benchmarks.compare [--directory FOLDER] [--engines NAME …] [--ik LLAMA_BENCH])

Makes all model files once in the folder (about 14 GB), then loads each engine in a process of its own, which
measures when it is told to and sleeps otherwise; each runs with its own defaults and the same number of threads.
Every round measures each case on all engines, in an order that changes. An engine that is not installed
or does not load is left out, and the report says why.

On a CPU with AVX-512 our precisions are measured a second time, in processes that may only use AVX2.
--ik adds ik_llama.cpp: its llama-bench runs once per round and case.

Writes benchmarks/results.json (each single measurement) and benchmarks/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.engines import Setup, matrix_bytes
from benchmarks.files import make_ctranslate2, make_gguf, make_huggingface, once, quantize_gguf
from benchmarks.llama_bench import LlamaBench, LlamaBenchError, check_program
from benchmarks.machine import ONLY_AVX2, features, has_more_than_avx2, machine
from benchmarks.make_checkpoint import LLAMA_3_2_1B, make_checkpoint
from benchmarks.report import AVX2, FOLDER, speed_bounds, versions, write_report
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.download.locate import find_model
from llama_scratch.errors import ModelNotFoundError
from llama_scratch.inference.speed import BANDWIDTH_BYTES, random_ids, read_bandwidth

REFERENCE = "llama.cpp BF16"
TRUTH = "ours fp32"
CHECKPOINT = "Llama3.2-1B"
PACKAGE_OF = {
    "ours": "llama_scratch",
    "llama.cpp": "llama_cpp",
    "ik_llama.cpp": "llama_cpp",  # writes its model files
    "ctranslate2": "ctranslate2",
    "transformers": "transformers",
}
# Threads of any OpenMP go to sleep within this time after their last work, with nothing set.
SETTLE_S = 0.3


@dataclass(frozen=True)
class Entry:
    """One engine of the run.

    Args:
        name: Its name in the report.
        kind: The program that runs it, a key of `PACKAGE_OF`.
        variant: The precision, or the type of the weights.
        file: The model's file in the folder of models.
        groups: The groups that it belongs to. Engines of one group are loaded at the same time. A group is only
            measured for the engines whose first group it is; the others are there to be compared with.
        model: The model that it runs.
        flash: Whether flash attention is on.
        long: Whether the long case is measured too.
        avx2: Whether the process may only use AVX2.
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


# The groups of the peers of 8 and 4 bits. Panels for AVX2 are files of their own, which need memory too.
PEERS = (1, 4)

ENTRIES = (
    Entry("ours bf16", "ours", "bf16", CHECKPOINT, long=True),
    Entry("ours int8", "ours", "int8", CHECKPOINT, long=True),
    Entry("ours int4", "ours", "int4", CHECKPOINT, long=True),
    Entry(f"ours bf16{AVX2}", "ours", "bf16", CHECKPOINT, long=True, avx2=True),
    Entry(f"ours int8{AVX2}", "ours", "int8", CHECKPOINT, groups=(4,), avx2=True),
    Entry(f"ours int4{AVX2}", "ours", "int4", CHECKPOINT, groups=(4,), avx2=True),
    Entry(REFERENCE, "llama.cpp", "BF16", "1B-BF16.gguf", groups=(1, 2, 4), long=True),
    Entry("llama.cpp BF16 flash", "llama.cpp", "BF16", "1B-BF16.gguf", PEERS, flash=True, long=True),
    Entry("llama.cpp F16", "llama.cpp", "F16", "1B-F16.gguf"),
    Entry("llama.cpp Q8_0", "llama.cpp", "Q8_0", "1B-Q8_0.gguf", PEERS),
    Entry("llama.cpp Q8_0 flash", "llama.cpp", "Q8_0", "1B-Q8_0.gguf", PEERS, flash=True, long=True),
    Entry("llama.cpp Q4_0", "llama.cpp", "Q4_0", "1B-Q4_0.gguf", PEERS),
    Entry("llama.cpp Q4_K_M", "llama.cpp", "Q4_K_M", "1B-Q4_K_M.gguf", PEERS),
    Entry("ik_llama.cpp Q8_0", "ik_llama.cpp", "Q8_0", "1B-Q8_0.gguf", PEERS),
    Entry("ik_llama.cpp Q4_K_M", "ik_llama.cpp", "Q4_K_M", "1B-Q4_K_M.gguf", PEERS),
    Entry("CTranslate2 int8", "ctranslate2", "int8", "ctranslate2-int8", groups=(2,)),
    # The engines that need most memory run beside the reference alone.
    Entry("ours fp16", "ours", "fp16", CHECKPOINT, groups=(2,)),
    Entry(TRUTH, "ours", "fp32", CHECKPOINT, groups=(2,)),
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
        """What is measured, by name: a prompt of `context` tokens, and `tokens` decoded behind it."""
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
    """The path of an entry's model, which is written first where it is missing."""
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


# --- Workers ----------------------------------------------------------------------------------


class WorkerError(Exception):
    """An engine cannot be measured; the message says why."""


class Worker:
    """An engine in its own process (benchmarks/engines.py)."""

    def __init__(self, entry: Entry, setup: Setup, log: Path):
        self.entry = entry
        self._log = log
        environment = os.environ | {
            "OMP_NUM_THREADS": str(setup["threads"]),
            "PYTHONPATH": str(FOLDER.parent),
            "HF_HUB_OFFLINE": "1",
            **(ONLY_AVX2 if entry.avx2 else {}),
        }
        with log.open("a") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engines", json.dumps(setup)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        self.ready = self._reply()

    def ask(self, do: str, ids: list[int], **more: int) -> dict[str, Any]:
        """Send a request and wait for its reply."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # then there is no reply either
            self._process.stdin.write(json.dumps({"do": do, "ids": ids, **more}) + "\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise WorkerError(
                f"the process of {self.entry.name} ended with exit code {code}, {self._log.name} says more"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            self.close()
            raise WorkerError(reply["error"])
        return reply

    def cpu_s(self) -> float:
        """Processor time that the process took so far."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class LlamaBenchWorker:
    """ik_llama.cpp with the interface of a `Worker`. No process runs between the measurements."""

    def __init__(self, entry: Entry, program: Path, model: Path, threads: int):
        self.entry = entry
        self._bench = LlamaBench(program, model, threads)
        self.ready: dict[str, Any] = {
            "load_s": None,
            "prepare_s": 0.0,
            "weight_bytes": matrix_bytes(model),
            "anonymous_bytes": 0,
            "file_bytes": 0,
            "kernels": "",
        }

    def ask(self, do: str, ids: list[int], *, new: int) -> dict[str, Any]:
        """Run a case. The ids are llama-bench's own; of a case that decodes, only decoding is measured."""
        assert do == "run"
        try:
            if new:
                return {"prefill_s": 0.0, "decode_s": self._bench.seconds(prompt=0, new=new)}
            return {"prefill_s": self._bench.seconds(prompt=len(ids), new=0), "decode_s": 0.0}
        except LlamaBenchError as error:
            raise WorkerError(str(error)) from None

    def cpu_s(self) -> float:
        """Processor time since the last measurement: none."""
        return 0.0

    def close(self) -> None:
        """Nothing to end."""


AnyWorker = Worker | LlamaBenchWorker


# --- Measuring --------------------------------------------------------------------------------


class Run:
    """Gathers what results.json holds."""

    def __init__(
        self,
        plan: Plan,
        cases: dict[str, dict[str, Any]],
        directory: Path,
        threads: int,
        llama_bench: Path | None = None,
    ):
        self.plan = plan
        self.cases = cases
        self.directory = directory
        self.threads = threads
        self.llama_bench = llama_bench
        self.llama_bench_commit = ""
        self.engines: dict[str, dict[str, Any]] = {}
        self.samples: list[dict[str, Any]] = []
        self.edits: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self._logits: dict[str, list[float]] = {}

    def measure_group(self, group: int, entries: Sequence[Entry], rounds: int, long_rounds: int) -> None:
        """Load the engines of one group, run all rounds on them, and end them."""
        workers = [worker for entry in entries if (worker := self._start(entry))]
        try:
            for round in range(rounds):
                order = random.Random(round).sample(workers, len(workers))
                for name, case in self.cases.items():
                    for worker in order:
                        entry = worker.entry
                        # The long case is measured in one group.
                        long = entry.long and group == entry.groups[0] and round < long_rounds
                        if entry.model == case["model"] and (long or not case["long"]):
                            print(f"Group {group}, round {round + 1} of {rounds}: {name}, {entry.name}", flush=True)
                            self._sample(group, round, name, worker, workers)
                self._edit(round, workers)
        except WorkerError as error:
            # What was measured counts. The others would have no one to be compared with in the rounds to come.
            self.left_out[f"The rest of group {group}"] = str(error)
            print(f"Group {group} ends here: {error}")
        finally:
            for worker in workers:
                worker.close()

    def try_llama_bench(self, entry: Entry) -> None:
        """Measure one token with llama-bench, to end before the long measurements if it does not work."""
        if self.llama_bench and find_spec(PACKAGE_OF[entry.kind]):
            path = model_file(self.directory, entry, self.plan)
            self.llama_bench_commit = LlamaBench(self.llama_bench, path, self.threads).version()

    def _start(self, entry: Entry) -> AnyWorker | None:
        if find_spec(PACKAGE_OF[entry.kind]) is None:
            self.left_out[entry.name] = f"{PACKAGE_OF[entry.kind]} is not installed"
            return None
        sizes = [case["context"] + case["tokens"] for case in self.cases.values() if case["model"] == entry.model]
        try:
            path = model_file(self.directory, entry, self.plan)
            setup = Setup(
                kind=entry.kind,
                path=str(path),
                variant=entry.variant,
                flash=entry.flash,
                threads=self.threads,
                context=max(self.plan.edit, *sizes),
            )
            print(f"Loading {entry.name}", flush=True)
            worker: AnyWorker
            if entry.kind == "ik_llama.cpp":
                assert self.llama_bench
                worker = LlamaBenchWorker(entry, self.llama_bench, path, self.threads)
            else:
                worker = Worker(entry, setup, self.directory / "workers.log")
        except (WorkerError, LlamaBenchError, ModelNotFoundError) as error:
            self.left_out[entry.name] = str(error)
            print(f"{entry.name} is left out: {error}")
            return None
        # Some engines are in several groups: their first loading counts.
        self.engines.setdefault(entry.name, {"model": entry.model, **worker.ready})
        if entry.model == "1B" and isinstance(worker, Worker):
            self._logits[entry.name] = worker.ask("logits", self._ids(32, seed=1))["logits"]
        return worker

    def _ids(self, count: int, seed: int) -> list[int]:
        # Ids that both vocabularies have.
        return random_ids(40_000, count, seed)

    def _sample(self, group: int, round: int, name: str, worker: AnyWorker, workers: Sequence[AnyWorker]) -> None:
        case = self.cases[name]
        bandwidth = read_bandwidth(self.plan.bandwidth_bytes)
        time.sleep(self.plan.settle_s)
        others = [other for other in workers if other is not worker]
        before, start = sum(other.cpu_s() for other in others), time.perf_counter()
        # No two measurements share a first token, so that no cache serves the next.
        ids = self._ids(case["context"] + case["tokens"], seed=len(self.samples) + 10)
        times = worker.ask("run", ids, new=case["tokens"])
        others_cpu = (sum(other.cpu_s() for other in others) - before) / (time.perf_counter() - start)
        self.samples.append(
            {
                "group": group,
                "round": round,
                "case": name,
                "engine": worker.entry.name,
                "bandwidth": bandwidth,
                "others_cpu": others_cpu,
                **times,
            }
        )

    def _edit(self, round: int, workers: Sequence[AnyWorker]) -> None:
        for worker in workers:
            if isinstance(worker, Worker) and worker.entry.name == "ours bf16":
                ids = self._ids(self.plan.edit, seed=1_000 + round)
                times = worker.ask("edit", ids, vocab_size=40_000)
                self.edits.append({"engine": worker.entry.name, "tokens": self.plan.edit, **times})

    def distances(self) -> None:
        """Set each engine's relative L2 distance from our fp32."""
        truth = torch.tensor(self._logits[TRUTH]).double() if TRUTH in self._logits else None
        for name, engine in self.engines.items():
            engine["distance"] = None
            if truth is not None and name in self._logits:
                values = torch.tensor(self._logits[name]).double()
                engine["distance"] = float((values - truth).norm() / truth.norm())


def selected(names: Sequence[str]) -> list[Entry]:
    """The entries whose names begin with one of `names`, all if it is empty; AVX2 twice only if the CPU has more."""
    twice = has_more_than_avx2(features())
    entries = [entry for entry in ENTRIES if twice or not entry.avx2]
    return [entry for entry in entries if not names or any(entry.name.startswith(name) for name in names)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the models, measure, write, and say which bounds are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where models are written (.cache/benchmark)")
    parser.add_argument("--output", type=Path, default=FOLDER, help="where results.json and results.md are written")
    parser.add_argument("--engines", nargs="*", default=[], metavar="NAME", help="only those that begin so (all)")
    parser.add_argument("--cases", nargs="*", metavar="NAME", help=f"of {', '.join(FULL.cases)} (all)")
    parser.add_argument("--rounds", type=int, help="rounds over all engines (5)")
    parser.add_argument("--long-rounds", type=int, help="rounds of the long case among them (3)")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False), help="threads of each engine")
    parser.add_argument(
        "--ik", type=Path, metavar="PATH", help="ik_llama.cpp's llama-bench, built for this machine (not measured)"
    )
    parser.add_argument("--ik-commit", metavar="COMMIT", help="its commit (the one that it reports)")
    parser.add_argument("--tiny", action="store_true", help="a network of two layers, in seconds: does it all work?")
    options = parser.parse_args(arguments)
    plan = TINY if options.tiny else FULL
    directory = options.directory or Path(".cache/benchmark-tiny" if options.tiny else ".cache/benchmark")
    rounds = options.rounds or (2 if options.tiny else 5)
    long_rounds = min(rounds, options.long_rounds or (1 if options.tiny else 3))
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "workers.log").write_text("")
    torch.set_num_threads(options.threads)

    cases = {name: case for name, case in plan.cases.items() if not options.cases or name in options.cases}
    run = Run(plan, cases, directory, options.threads, options.ik)
    entries = selected(options.engines)
    theirs = [entry for entry in entries if entry.kind == "ik_llama.cpp"]
    if options.ik:
        try:
            check_program(options.ik)
            for entry in theirs:
                run.try_llama_bench(entry)
        except LlamaBenchError as error:
            raise SystemExit(str(error)) from None
    elif theirs:
        entries = [entry for entry in entries if entry not in theirs]
        run.left_out["ik_llama.cpp"] = "not measured, because --ik did not name its llama-bench"
    for group in sorted({entry.groups[0] for entry in entries}):
        run.measure_group(group, [entry for entry in entries if group in entry.groups], rounds, long_rounds)
    if not run.samples:
        raise SystemExit(f"No engine could be measured: {run.left_out or 'none is called so'}; see --help.")
    run.distances()
    checkpoint = open_checkpoint(directory / CHECKPOINT).args
    ik_commit = run.llama_bench_commit and (options.ik_commit or run.llama_bench_commit)
    results = {
        "model": {
            "name": "Llama 3.2 1B's shape" if plan is FULL else "A tiny network",
            "parameters": checkpoint.n_parameters(tied=True),
            "layers": checkpoint.n_layers,
            "dim": checkpoint.dim,
        },
        "machine": machine(options.threads),
        "versions": versions() | ({"ik_llama.cpp": ik_commit} if ik_commit else {}),
        "reference": REFERENCE,
        "rounds": rounds,
        "long_rounds": long_rounds,
        "cases": cases,
        "engines": {entry.name: run.engines[entry.name] for entry in entries if entry.name in run.engines},
        "samples": run.samples,
        "edits": run.edits,
        "left_out": run.left_out,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_report(options.output)
    for bound in speed_bounds(results):
        print(bound)


if __name__ == "__main__":
    main()
