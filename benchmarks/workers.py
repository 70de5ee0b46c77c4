"""Worker processes of the engines. Each engine has its own memory and threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engines import Setup, matrix_bytes
from benchmarks.entries import Entry
from benchmarks.llama_bench import LlamaBench, LlamaBenchError
from benchmarks.machine import ONLY_AVX2
from benchmarks.report import FOLDER


class WorkerError(Exception):
    """An engine cannot be measured. The message is the reason."""


class Worker:
    """An engine in its own process (benchmarks/engines.py).

    Args:
        entry: The engine.
        setup: Settings of the process.
        log: File for its stderr.
    """

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
        """Send a request and wait for its reply.

        Args:
            do: Kind of request.
            ids: Token ids.
            more: Other fields of the request.
        """
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
            raise WorkerError(f"the process of {self.entry.name} ended with exit code {code} (see {self._log.name})")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            self.close()
            raise WorkerError(reply["error"])
        return reply

    def cpu_s(self) -> float:
        """CPU time of the process so far, in seconds."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class LlamaBenchWorker:
    """ik_llama.cpp with the interface of `Worker`. Runs a new process per measurement."""

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
        """Run a case.

        llama-bench uses its own token ids, and measures either prefill or decode.

        Args:
            do: Must be "run".
            ids: Only their number is used.
            new: Number of tokens to decode; 0 measures the prefill.
        """
        assert do == "run"
        try:
            if new:
                return {"prefill_s": 0.0, "decode_s": self._bench.seconds(prompt=0, new=new)}
            return {"prefill_s": self._bench.seconds(prompt=len(ids), new=0), "decode_s": 0.0}
        except LlamaBenchError as error:
            raise WorkerError(str(error)) from None

    def cpu_s(self) -> float:
        """CPU time between measurements: always 0, because there is no process then."""
        return 0.0

    def close(self) -> None:
        """Do nothing."""


AnyWorker = Worker | LlamaBenchWorker
