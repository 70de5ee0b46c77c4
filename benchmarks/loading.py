"""Measure load time and memory for each file format.

    python -m benchmarks.loading [--tiny] [--rounds 3] [--precisions NAME …] [--directory DIR] [--output DIR]

A random model with the dimensions of Llama 3.2 1B is written in all formats (20 GB of disk space in DIR). Each load
runs in a new process, and the formats alternate. Figures are medians with a warm page cache. Writes loading.json and
results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks.entries import CHECKPOINT, FULL, TINY
from benchmarks.files import make_gguf, make_huggingface, make_shards, once, quantize_gguf
from benchmarks.machine import machine
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.report import FOLDER, versions, write_report

PROMPT = "The capital of France is"
PRECISIONS = ("bf16", "fp16", "int8")
Make = Callable[[Path], None]


def forms(directory: Path, params: dict[str, Any], peers: bool) -> dict[str, Path]:
    """Write the model in all formats, unless the files exist.

    Args:
        directory: Folder of the files.
        params: Contents of params.json.
        peers: Whether to include files quantized by llama.cpp.

    Returns:
        Name of the format → path.
    """
    source = once(directory / CHECKPOINT, partial(make_checkpoint, params=params))
    made: dict[str, tuple[str, Make]] = {
        "Meta, 2 shards": ("two-shards", partial(make_shards, source, count=2)),
        "Hugging Face": ("hf", lambda target: make_huggingface(source, target)),
        "GGUF BF16": ("1B-BF16.gguf", lambda target: make_gguf(source, target, torch.bfloat16)),
        "GGUF F16": ("1B-F16.gguf", lambda target: make_gguf(source, target, torch.float16)),
    }
    found = {"Meta": source} | {name: once(directory / file, make) for name, (file, make) in made.items()}
    for kind in ("Q8_0", "Q4_0", "Q4_K_M") if peers else ():
        quantize = partial(quantize_gguf, found["GGUF BF16"], kind=kind)
        found[f"GGUF {kind}"] = once(directory / f"1B-{kind}.gguf", quantize)
    return found


def measured(path: Path, precision: str) -> dict[str, float]:
    """Load a model in this process and measure time and memory.

    Args:
        path: The model.
        precision: The precision.

    Returns:
        Seconds until the model is loaded, has answered and is prepared. Peak private memory until each of these
        moments, in bytes. Private memory and mapped file pages at the end, in bytes.
    """
    from llama_scratch import Llama

    before = _private()
    most, done = before, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, _private())

    threading.Thread(target=watch, daemon=True).start()
    found: dict[str, float] = {}
    start = time.perf_counter()

    def moment(name: str) -> None:
        found[f"{name}_s"] = time.perf_counter() - start
        found[f"{name}_private"] = max(most, _private()) - before

    llama = Llama.load(path, precision=precision, device="cpu", context=512)
    moment("loaded")
    llama.predict(PROMPT)
    moment("answered")
    llama.prepare()
    moment("prepared")
    done.set()
    found["private"] = _private() - before
    found["mapped"] = psutil.Process().memory_info().shared
    llama.close()
    return found


def _private() -> int:
    """Resident memory without file pages, in bytes (Linux)."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def in_turns(models: dict[str, Path], precisions: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Measure all formats and precisions alternately.

    Args:
        models: Name of the format → path.
        precisions: The precisions.
        rounds: Number of rounds.

    Returns:
        One row per format and precision, with medians over the rounds.
    """
    entries = [(name, precision) for name in models for precision in precisions]
    samples: dict[tuple[str, str], list[dict[str, float]]] = {entry: [] for entry in entries}
    for number in range(rounds):
        for entry in entries:
            sample = _in_a_process(models[entry[0]], entry[1])
            samples[entry].append(sample)
            print(f"{number + 1}/{rounds} {entry[0]} {entry[1]}: {sample['answered_s']:.2f} s", flush=True)
    return [
        {
            "form": name,
            "precision": precision,
            "bytes": _size(models[name]),
            **{key: median(sample[key] for sample in samples[name, precision]) for key in samples[name, precision][0]},
        }
        for name, precision in entries
    ]


def _in_a_process(path: Path, precision: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loading", "--one", str(path), precision]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    sample: dict[str, float] = json.loads(done.stdout)
    return sample


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def main(arguments: list[str] | None = None) -> None:
    """Measure, record and render the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use a small model, to test the benchmark")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--directory", type=Path, help="folder for the model files")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--one", nargs=2, metavar=("PATH", "PRECISION"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(measured(Path(given.one[0]), given.one[1])))
        return
    plan = TINY if given.tiny else FULL
    directory = (given.directory or Path(".cache/benchmark-tiny" if given.tiny else ".cache/benchmark")).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    models = forms(directory, plan.params, peers=not given.tiny)
    kept = {
        "rounds": given.rounds,
        "threads": torch.get_num_threads(),
        "rows": in_turns(models, given.precisions, given.rounds),
        "versions": versions(),
        "machine": machine(),
    }
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "loading.json").write_text(json.dumps(kept, indent=1) + "\n")
    write_report(given.output)


if __name__ == "__main__":
    main()
