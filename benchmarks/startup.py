"""Measure the startup time.

    python -m benchmarks.startup [--model-dir DIR] [--runs 7] [--json] [--record]

Figures are medians over the runs, with a warm page cache and a pseudo-terminal that is read without delay. The default
model is the default of `llama-scratch`. --record writes benchmarks/startup.json and renders
benchmarks/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from unittest.mock import patch

from benchmarks.machine import machine
from benchmarks.report import FOLDER, versions, write_report
from benchmarks.sections.startup import ROWS
from llama_scratch.checkpoint.base import name_of
from llama_scratch.download.locate import find_model
from llama_scratch.precision import kernels
from tests.helpers.terminal import PROGRAM, Terminal

TYPED = "abcdefghijklmnopqrstuvwxyz"
TYPING_INTERVAL = 0.05  # seconds between keystrokes of a fast typist
COMPILE = """
import time
from llama_scratch.precision import kernels
start = time.perf_counter()
if not kernels.build():
    raise SystemExit(kernels.state())
print(time.perf_counter() - start)
"""
LOADED = "lists the commands"  # part of the banner


def seconds(run: Callable[[], object]) -> float:
    """Duration of a call in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def answer(options: list[str]) -> float:
    """Seconds from the program's start to the answer of one prompt."""
    return first_line(*PROGRAM, *options, "--no-input", "--prompt", "The capital of France is")


def compiling() -> float:
    """Seconds to compile the kernels with an empty cache."""
    made = subprocess.run([sys.executable, "-c", COMPILE], check=True, capture_output=True, text=True)
    return float(made.stdout)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Use an empty cache folder for the programs that are started in the context."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, XDG_CACHE_HOME=folder):
        yield


def process(*command: str) -> float:
    """Seconds from a program's start to its end."""
    return seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))


def first_line(*command: str) -> float:
    """Seconds from a program's start to its first line of output."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        assert program.stdout is not None
        if not program.stdout.readline():
            raise SystemExit(f"{' '.join(command)} printed nothing. Run it to see why.")
        return time.perf_counter() - start


def until(terminal: Terminal, seen: Callable[[str], bool]) -> float:
    """Measure the seconds until the screen meets a condition.

    Args:
        terminal: The terminal.
        seen: The condition, for the text on the screen.
    """

    def read() -> None:
        while not seen(terminal.text):
            if not terminal.read(0.002):
                raise SystemExit(f"The session ended unexpectedly. Its output: {terminal.text}")

    return seconds(read)


def shows(typed: str, text: str) -> bool:
    """Whether a screen shows a typed text, ignoring line breaks.

    Args:
        typed: The typed text.
        text: The text on the screen.
    """
    return typed in text.replace("\n", "")


def session(options: list[str]) -> dict[str, float]:
    """Measure one session: first prompt, end of loading, and keystroke latency."""
    start = time.perf_counter()
    with Terminal(*options, columns=200) as terminal:
        until(terminal, lambda text: "> " in text)
        prompt = time.perf_counter() - start
        lags: list[float] = []
        typed = ""
        while LOADED not in terminal.text:
            typed += TYPED[len(typed) % len(TYPED)]
            terminal.type(typed[-1])
            lags.append(until(terminal, partial(shows, typed)))
            pause = time.perf_counter() + TYPING_INTERVAL
            while time.perf_counter() < pause and terminal.read(0.005):
                pass
        return {
            "prompt": prompt,
            "loaded": time.perf_counter() - start,
            "echo": median(lags),
            "slowest echo": max(lags),
        }


def measure(options: list[str], runs: int) -> dict[str, float]:
    """Measure all `ROWS`.

    Args:
        options: Options of the program.
        runs: Number of runs.

    Returns:
        The medians in seconds.
    """
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    for _ in range(runs + 1):
        found["python"].append(process(sys.executable, "-c", "pass"))
        found["torch"].append(process(sys.executable, "-c", "import os, torch; os._exit(0)"))
        found["answer"].append(answer(options))
        if kernels.compiler():
            found["int8"].append(answer([*options, "--precision", "int8"]))
            with nothing_kept():
                found["first int8"].append(answer([*options, "--precision", "int8"]))
            with nothing_kept():
                found["compile"].append(compiling())
        for row, value in session(options).items():
            found[row].append(value)
    # The first run warms the cache.
    return {row: median(values[1:]) for row, values in found.items() if values}


def record(model_dir: str | None, runs: int, medians: dict[str, float]) -> None:
    """Record the medians and render the report.

    Args:
        model_dir: The model directory, or None for the default model.
        runs: Number of runs.
        medians: The medians in seconds.
    """
    model = name_of(find_model(model_dir))
    kept = {
        "model": model,
        "runs": runs,
        "rows": ROWS,
        "seconds": medians,
        "versions": versions(),
        "machine": machine(),
    }
    (FOLDER / "startup.json").write_text(json.dumps(kept, indent=1) + "\n")
    write_report(FOLDER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", metavar="DIR")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    runs = max(1, arguments.runs)
    medians = measure(["--model-dir", arguments.model_dir] if arguments.model_dir else [], runs)
    if arguments.record:
        record(arguments.model_dir, runs, medians)
    if arguments.json:
        print(json.dumps({row.replace(" ", "_") + "_s": round(value, 4) for row, value in medians.items()}))
    else:
        for row, value in medians.items():
            print(f"{ROWS[row]:60}{1000 * value:8,.0f} ms")


if __name__ == "__main__":
    main()
