"""Compare the speed of this package with other engines in one alternating run.

    make benchmark        (python -m benchmarks.compare [--directory FOLDER] [--engines NAME …] [--ik LLAMA_BENCH])

The first run creates all model files (about 14 GB). Each engine is loaded in its own process, which measures on request
and sleeps otherwise. Engines run with their default settings and the same number of threads. Every round measures each
case on all engines, in varying order. If an engine is not installed or fails to load, it is skipped and the report has
the reason.

On a CPU with AVX-512, our precisions are also measured in processes limited to AVX2.
--ik adds ik_llama.cpp: its llama-bench runs once per round and case.

Writes benchmarks/results.json (every measurement) and benchmarks/results.md.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.engines import Setup
from benchmarks.entries import (
    CHECKPOINT,
    FULL,
    GROUND_TRUTH,
    PACKAGE_OF,
    REFERENCE,
    TINY,
    Entry,
    Plan,
    model_file,
    selected,
)
from benchmarks.llama_bench import LlamaBench, LlamaBenchError, check_program
from benchmarks.machine import machine
from benchmarks.report import FOLDER, versions, write_report
from benchmarks.sections.speed_bounds import speed_bounds
from benchmarks.workers import AnyWorker, LlamaBenchWorker, Worker, WorkerError
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.errors import ModelNotFoundError
from llama_scratch.inference.speed import random_ids, read_bandwidth


class Run:
    """Measures the engines and collects the content of results.json.

    Args:
        plan: Sizes of the model and of the cases.
        cases: Name → case.
        directory: Folder of the model files.
        threads: Threads per engine.
        llama_bench: Path of ik_llama.cpp's llama-bench, if it is measured.
    """

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
        """Load the engines of one group, measure all rounds, and end the processes.

        Args:
            group: Number of the group.
            entries: The engines of the group.
            rounds: Number of rounds.
            long_rounds: Number of rounds that include the long case.
        """
        workers = [worker for entry in entries if (worker := self._start(entry))]
        try:
            for round in range(rounds):
                order = random.Random(round).sample(workers, len(workers))
                for name, case in self.cases.items():
                    for worker in order:
                        entry = worker.entry
                        # The long case is measured in only one group.
                        long = entry.long and group == entry.groups[0] and round < long_rounds
                        if entry.model == case["model"] and (long or not case["long"]):
                            print(f"Group {group}, round {round + 1} of {rounds}: {name}, {entry.name}", flush=True)
                            self._sample(group, round, name, worker, workers)
                self._edit(round, workers)
        except WorkerError as error:
            # Keep the measurements, but stop, because this engine would be missing in later rounds.
            self.left_out[f"The rest of group {group}"] = str(error)
            print(f"Group {group} stops here: {error}")
        finally:
            for worker in workers:
                worker.close()

    def try_llama_bench(self, entry: Entry) -> None:
        """Measure one token with llama-bench, to detect errors before the long run."""
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
            print(f"{entry.name} is not measured: {error}")
            return None
        # If an engine is in several groups, record its first load.
        self.engines.setdefault(entry.name, {"model": entry.model, **worker.ready})
        if entry.model == "1B" and isinstance(worker, Worker):
            self._logits[entry.name] = worker.ask("logits", self._ids(32, seed=1))["logits"]
        return worker

    def _ids(self, count: int, seed: int) -> list[int]:
        # Token ids that exist in both vocabularies.
        return random_ids(40_000, count, seed)

    def _sample(self, group: int, round: int, name: str, worker: AnyWorker, workers: Sequence[AnyWorker]) -> None:
        case = self.cases[name]
        bandwidth = read_bandwidth(self.plan.bandwidth_bytes)
        time.sleep(self.plan.settle_s)
        others = [other for other in workers if other is not worker]
        before, start = sum(other.cpu_s() for other in others), time.perf_counter()
        # The first token differs between runs, to avoid prefix cache hits.
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
        """Set the relative L2 distance of each engine's logits from our fp32."""
        truth = torch.tensor(self._logits[GROUND_TRUTH]).double() if GROUND_TRUTH in self._logits else None
        for name, engine in self.engines.items():
            engine["distance"] = None
            if truth is not None and name in self._logits:
                values = torch.tensor(self._logits[name]).double()
                engine["distance"] = float((values - truth).norm() / truth.norm())

    def results(self, entries: Sequence[Entry], ik_commit: str | None, rounds: int, long_rounds: int) -> dict[str, Any]:
        """Return the content of results.json.

        Args:
            entries: The engines of the run, in the order of the report.
            ik_commit: The commit of ik_llama.cpp. None: the commit that its llama-bench reports.
            rounds: Number of rounds.
            long_rounds: Number of rounds that include the long case.
        """
        checkpoint = open_checkpoint(self.directory / CHECKPOINT).args
        commit = self.llama_bench_commit and (ik_commit or self.llama_bench_commit)
        return {
            "model": {
                "name": "Llama 3.2 1B's shape" if self.plan is FULL else "A tiny network",
                "parameters": checkpoint.n_parameters(tied=True),
                "layers": checkpoint.n_layers,
                "dim": checkpoint.dim,
            },
            "machine": machine(self.threads),
            "versions": versions() | ({"ik_llama.cpp": commit} if commit else {}),
            "reference": REFERENCE,
            "rounds": rounds,
            "long_rounds": long_rounds,
            "cases": self.cases,
            "engines": {entry.name: self.engines[entry.name] for entry in entries if entry.name in self.engines},
            "samples": self.samples,
            "edits": self.edits,
            "left_out": self.left_out,
        }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="folder for the model files (default: .cache/benchmark)")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for results.json and results.md")
    parser.add_argument("--engines", nargs="*", default=[], metavar="NAME", help="name prefixes (default: all engines)")
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="NAME", help="full names of engines to skip")
    parser.add_argument("--cases", nargs="*", metavar="NAME", help=f"from {', '.join(FULL.cases)} (default: all)")
    parser.add_argument("--rounds", type=int, help="rounds over all engines (default: 5)")
    parser.add_argument("--long-rounds", type=int, help="rounds that include the long case (default: 3)")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False), help="threads per engine")
    parser.add_argument(
        "--ik", type=Path, metavar="PATH", help="ik_llama.cpp's llama-bench, built for this machine (default: skip it)"
    )
    parser.add_argument(
        "--ik-commit", metavar="COMMIT", help="commit of ik_llama.cpp (default: as reported by llama-bench)"
    )
    parser.add_argument("--tiny", action="store_true", help="use a network of two layers, to test the benchmark")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Create the models, measure, write the results, and print the verdicts."""
    options = _parser().parse_args(arguments)
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
    entries = selected(options.engines, options.leave_out)
    run.left_out |= dict.fromkeys(options.leave_out, "skipped in this run")
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
        run.left_out["ik_llama.cpp"] = "not measured; pass the path of its llama-bench with --ik"
    for group in sorted({entry.groups[0] for entry in entries}):
        run.measure_group(group, [entry for entry in entries if group in entry.groups], rounds, long_rounds)
    if not run.samples:
        raise SystemExit(f"No engine was measured: {run.left_out or 'no name matches'}. See --help.")
    run.distances()
    results = run.results(entries, options.ik_commit, rounds, long_rounds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_report(options.output)
    for bound in speed_bounds(results):
        print(bound)


if __name__ == "__main__":
    main()
