"""Measure ik_llama.cpp by running its `llama-bench`, one process per measurement.

The program loads the model each time. Its figures do not include loading.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

# Repetitions per measurement. The last one is used, because the first includes page faults of new buffers.
REPETITIONS = 2
PATIENCE_S = 900  # for one measurement, including loading
_HINT = "Build the target llama-bench of ik_llama.cpp, and pass its path with --ik."


class LlamaBenchError(Exception):
    """llama-bench did not return a result."""


def check_program(program: Path) -> None:
    """Raise `LlamaBenchError` if a path is not an executable file."""
    if not program.is_file() or shutil.which(program.absolute()) is None:
        raise LlamaBenchError(f"{program} is not a program. {_HINT}")


class LlamaBench:
    """ik_llama.cpp's `llama-bench` on one GGUF file.

    Weights are repacked at load time (`-rtr 1`). All other settings are the program's defaults.

    Args:
        program: The path of llama-bench.
        model: The GGUF file.
        threads: Number of threads.
    """

    def __init__(self, program: Path, model: Path, threads: int):
        self._command = [str(program.absolute()), "-m", str(model), "-t", str(threads), "-rtr", "1"]
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def version(self) -> str:
        """Measure one token and return the program's commit, or "unknown"."""
        return str(self._run(prompt=1, new=0).get("build_commit", "unknown"))

    def seconds(self, *, prompt: int, new: int) -> float:
        """Measure either a prompt or decoding from an empty cache.

        Args:
            prompt: Number of prompt tokens, or 0.
            new: Number of decoded tokens, or 0.

        Returns:
            Seconds.
        """
        return float(self._run(prompt=prompt, new=new)["samples_ns"][-1]) / 1e9

    def _run(self, *, prompt: int, new: int) -> dict[str, Any]:
        command = [*self._command, "-p", str(prompt), "-n", str(new), "-r", str(REPETITIONS), "-o", "json"]
        name = self._command[0]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PATIENCE_S,
                env=self._environment,
                check=False,
            )
        except OSError as error:
            raise LlamaBenchError(f"{name} could not be started: {error.strerror}. {_HINT}") from None
        except subprocess.TimeoutExpired:
            raise LlamaBenchError(f"{name} took more than {PATIENCE_S} s. Run it by hand to see why.") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it wrote no message"]
            said = next((line for line in lines if "error" in line), lines[-1]).strip()[:300]
            raise LlamaBenchError(f"{name} failed with exit code {done.returncode}: {said}. {_HINT}")
        figures = _figures(done.stdout)
        if figures is None:
            raise LlamaBenchError(f"{name} did not print figures in JSON. {_HINT}")
        return figures


def _figures(output: str) -> dict[str, Any] | None:
    """Find the JSON object in llama-bench's output, among other lines."""
    for start in re.finditer(r"^\s*\{", output, re.MULTILINE):
        try:
            figures, _ = json.JSONDecoder().raw_decode(output, start.end() - 1)
        except json.JSONDecodeError:
            continue
        samples = figures.get("samples_ns")
        if isinstance(samples, list) and samples and all(isinstance(ns, int) and ns > 0 for ns in samples):
            return dict(figures)
    return None
