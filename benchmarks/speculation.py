"""Compare prompt lookup decoding with plain decoding: equal results, and speed.

    python -m benchmarks.speculation [--model NAME] [--precisions int8,int4] [--tokens 192] [--rounds 5] [--record]

Each precision is measured on three kinds of texts: repetitive texts, other texts (sampled with a temperature to avoid
loops), and many prompts (greedy decoding). Each text is generated alternately with and without prompt lookup, with
packed weights. A ratio compares the seconds from the first to the last token within one round, and the report has the
median ratio. The ids and all bits of the log probabilities must be equal; otherwise the exit code is 1.

--record adds the figures to benchmarks/speculation.json and keeps those of other precisions and texts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.report import FOLDER, versions
from llama_scratch.llama import Llama
from llama_scratch.results import Step
from llama_scratch.sampling import GREEDY, Sampling

NAMES = ("width", "height", "depth", "color")
QUOTE = "The quick brown fox jumps over the lazy dog and runs into the forest behind the old mill.\n"
CHORUS = "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily,\nLife is but a dream.\n\n"
REPEATS = (
    3 * "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. ",
    2 * "".join(f"def get_{name}(self):\n    return self._{name}\n\n" for name in NAMES),
    "".join(f'{{"id": {i}, "name": "{name}", "visible": true, "tags": []}},\n' for i, name in enumerate(NAMES)),
    "".join(f"7 times {i} is {7 * i}.\n" for i in range(1, 7)),
    "".join(f"2024-03-0{i} 12:00:00 INFO server: request {i} was answered in 10 ms\n" for i in range(1, 6)),
    "".join(f"| {name} | the {name} of the box | number | yes |\n" for name in NAMES),
    3 * QUOTE,
    2 * CHORUS,
)
OPENINGS = (
    "Once upon a time, in a {},",
    "The history of the {} begins",
    "I never told anybody that the {}",
    "Here is a list of things that one finds in a {}:\n1.",
    "Dear friend, yesterday I saw a {} and",
    "Question: what is a {}?\nAnswer:",
)
THINGS = (
    "city",
    "river",
    "kitchen",
    "computer",
    "forest",
    "school",
    "ship",
    "garden",
    "mountain",
    "library",
    "village",
    "theatre",
)
MANY = tuple(opening.format(thing) for opening in OPENINGS for thing in THINGS)
FRESH = MANY[::8]


@dataclass(frozen=True)
class Text:
    prompt: str
    sampling: Sampling = GREEDY


TEXTS = {
    "repeats": [Text(prompt) for prompt in REPEATS],
    "does not": [Text(prompt, Sampling(temperature=1.0, seed=seed)) for seed, prompt in enumerate(FRESH)],
    "many": [Text(prompt) for prompt in MANY],
}


def generated(llama: Llama, text: Text, tokens: int, speculate: bool) -> tuple[list[Step], float]:
    """Generate a text.

    Args:
        llama: The model.
        text: The prompt and its sampling parameters.
        tokens: Maximum number of tokens.
        speculate: Whether to use prompt lookup.

    Returns:
        The steps, and the seconds from the first token to the last.
    """
    llama.speculate = speculate
    steps, start = [], 0.0
    for step in llama.continuation(text.prompt, tokens, text.sampling):
        start = start or time.perf_counter()
        steps.append(step)
    return steps, time.perf_counter() - start


def bits(steps: list[Step]) -> list[tuple[int, str]]:
    """Return the id and the exact log probability of each step, for comparison."""
    return [(step.id, step.logprob.hex()) for step in steps]


def measure(llama: Llama, texts: list[Text], tokens: int, rounds: int) -> dict[str, Any]:
    """Measure decoding alternately with and without prompt lookup.

    Args:
        llama: The model.
        texts: The texts.
        tokens: Maximum number of tokens per text.
        rounds: Number of rounds.

    Returns:
        Median tokens per second, the median ratio, and the numbers of compared and of different tokens.
    """
    ratios: list[float] = []
    rates: dict[bool, list[float]] = {True: [], False: []}
    compared = differ = 0
    for turn in range(rounds):
        for i, text in enumerate(texts):
            order = (True, False) if (turn + i) % 2 else (False, True)
            found = {speculate: generated(llama, text, tokens, speculate) for speculate in order}
            ours, plain = bits(found[True][0]), bits(found[False][0])
            compared += len(plain)
            differ += abs(len(ours) - len(plain)) + sum(a != b for a, b in zip(ours, plain, strict=False))
            if len(plain) > 1:
                ratios.append(found[False][1] / found[True][1])
                for speculate, (steps, seconds) in found.items():
                    rates[speculate].append((len(steps) - 1) / seconds)
    return {
        "texts": len(texts),
        "plain": median(rates[False]),
        "drafts": median(rates[True]),
        "ratio": median(ratios),
        "compared": compared,
        "differ": differ,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--precisions", default="int8,int4")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds per text, except for the many prompts, which have one round"
    )
    parser.add_argument("--kinds", default=",".join(TEXTS))
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for precision in arguments.precisions.split(","):
        llama = Llama.load(arguments.model, precision=precision, device="cpu")
        llama.prepare()
        found[precision] = {}
        for kind in arguments.kinds.split(","):
            rounds = 1 if kind == "many" else arguments.rounds
            found[precision][kind] = measure(llama, TEXTS[kind], arguments.tokens, rounds)
            print(precision, kind, json.dumps(found[precision][kind]), file=sys.stderr)
        name = llama.info.name
        llama.close()
    kept = {
        "model": name,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "precisions": found,
        "versions": versions(),
        "machine": machine(),
    }
    if arguments.record:
        path = FOLDER / "speculation.json"
        recorded = json.loads(path.read_text()) if path.is_file() else {}
        same_cpu = recorded.get("machine", {}).get("features") == kept["machine"]["features"]
        before = recorded["precisions"] if same_cpu else {}
        kept["precisions"] = before | {precision: before.get(precision, {}) | found[precision] for precision in found}
        path.write_text(json.dumps(kept, indent=1) + "\n")
    return int(any(kind["differ"] for kinds in found.values() for kind in kinds.values()))


if __name__ == "__main__":
    sys.exit(main())
