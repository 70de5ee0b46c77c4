"""Measure the microscope, and decode speed after its hooks are removed.

    python -m benchmarks.microscope [--model-dir DIR …] [--runs 5] [--tokens 64] [--json] [--record]

Measures for each model (default: smollm2), as medians:

- /lens on 64 tokens and /why on 16 tokens, each run with a different text,
- decoding one token, alternately with a network that never had hooks and a network whose hooks were removed.

--record writes benchmarks/microscope.json and renders benchmarks/results.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.quality import text, windows
from benchmarks.report import FOLDER, versions, write_report
from benchmarks.startup import seconds
from llama_scratch.llama import Llama
from llama_scratch.microscope.attribution import why
from llama_scratch.microscope.lens import lens

LENS_TOKENS, WHY_TOKENS = 64, 16
ROWS = {
    "lens": f"/lens, {LENS_TOKENS} tokens",
    "why": f"/why, {WHY_TOKENS} tokens",
    "never tapped": "decode of one token, no hooks",
    "tapped before": "decode of one token, hooks removed",
}


def opened(source: str) -> Llama:
    """Load and prepare a model."""
    llama = Llama.load(source, device="cpu")
    llama.prepare()
    return llama


def timed(look: Callable[[Sequence[int]], object], texts: Sequence[Sequence[int]]) -> float:
    """Median time of a view in seconds. The first text is a warm-up.

    Args:
        look: Computes the view of a text.
        texts: Token ids of the texts.
    """
    times = [seconds(lambda ids=ids: look(ids)) for ids in texts]  # type: ignore[misc]
    return median(times[1:])


def decode(llamas: Sequence[Llama], ids: Sequence[int], tokens: int) -> list[list[float]]:
    """Measure decoding with several models alternately, in varying order.

    Args:
        llamas: The models.
        ids: The prompt.
        tokens: Number of tokens to decode.

    Returns:
        Seconds per token for each model.
    """
    times: list[list[float]] = [[] for _ in llamas]
    text = list(ids)
    for llama in llamas:
        llama.engine.next_logits(text)
    for step in range(tokens):
        text.append(ids[step % len(ids)])
        order = list(zip(llamas, times, strict=True))
        for llama, found in order if step % 2 else order[::-1]:
            found.append(seconds(lambda llama=llama: llama.engine.next_logits(text)))  # type: ignore[misc]
    return times


def measure(source: str, runs: int, tokens: int) -> dict[str, Any]:
    """Measure one model.

    Args:
        source: Name or path of the model.
        runs: Number of runs.
        tokens: Number of tokens to decode.

    Returns:
        Medians of `ROWS` in seconds, and the median ratio of the last two.
    """
    tapped, untouched = opened(source), opened(source)
    ids = tapped.encode(text()[:20_000])
    lens_texts = windows(ids, LENS_TOKENS, LENS_TOKENS * (runs + 1))
    found = {
        "lens": timed(lambda ids: lens(tapped, ids), lens_texts),
        "why": timed(lambda ids: why(tapped, ids), windows(ids, WHY_TOKENS, WHY_TOKENS * (runs + 1))),
    }
    never, before = decode((untouched, tapped), lens_texts[0], tokens)
    found |= {"never tapped": median(never), "tapped before": median(before)}
    ratio = median(b / a for a, b in zip(never, before, strict=True))
    model = {"name": tapped.info.name, "precision": tapped.info.precision, "seconds": found, "ratio": ratio}
    for llama in (tapped, untouched):
        llama.close()
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", metavar="DIR", nargs="+", default=["smollm2"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode with each network")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--output", type=Path, default=FOLDER)
    given = parser.parse_args(arguments)
    runs = max(1, given.runs)
    models = [measure(source, runs, max(1, given.tokens)) for source in given.model_dir]
    kept = {
        "runs": runs,
        "tokens": given.tokens,
        "threads": torch.get_num_threads(),
        "rows": ROWS,
        "models": models,
        "versions": versions(),
        "machine": machine(),
    }
    if given.record:
        (given.output / "microscope.json").write_text(json.dumps(kept, indent=1) + "\n")
        write_report(given.output)
    if given.json:
        print(json.dumps(kept))
        return
    for model in models:
        print(f"{model['name']} in {model['precision']}")
        for row, value in model["seconds"].items():
            print(f"  {ROWS[row]:50}{1000 * value:8,.1f} ms")
        print(f"  {'hooks removed ÷ no hooks':50}{model['ratio']:8.3f}")


if __name__ == "__main__":
    main()
