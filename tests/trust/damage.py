"""Truncate files of a small model or flip bits, and check the outcome.

    python -m tests.trust.damage [--truncations N] [--flips N] [--seed N]

Each damaged model is loaded, answers a prompt and is checked by `verify`, with and without the checksums that
`convert` writes. The whole loaded model is compared: its shape, the tokenizer with the bytes of every token, the chat
template, the bits of every weight and the logits.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama_scratch.checkpoint.byte_level_bpe import template_of
from llama_scratch.checkpoint.checksums import CHECKLIST, write_checksums
from llama_scratch.checkpoint.convert import convert
from llama_scratch.checkpoint.findings import Verification
from llama_scratch.checkpoint.verify import verify
from llama_scratch.errors import LlamaScratchError
from llama_scratch.llama import Llama
from tests.helpers.checkpoints import tiny_params, write_meta
from tests.trust.record import write

FORMS = ("meta", "hf", "gguf")
# Small weights, so that a large part of each file is metadata.
PARAMS = tiny_params(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim_multiplier=1.0)
PROMPT = "the answer is in the end"
# Half of the damage is in the first and last bytes, because the metadata is there.
_ENDS = 4096
# Maximum seconds per damaged file.
_PATIENCE = 10.0


@dataclass(frozen=True)
class Model:
    """A complete model: `path` opens it, and `files` can be damaged."""

    form: str
    path: Path
    files: list[Path]


@dataclass
class Outcome:
    """Results for one kind of damage to one file.

    Attributes:
        named: Rejected, with a message that names the file.
        refused: Rejected, with a message that names another file (for example if two files do not match).
        unaffected: The loaded model is unchanged.
        unnoticed: A different model was loaded without an error.
        found: Of the unnoticed, those that `verify` finds with the checksums.
        found_alone: Of the unnoticed, those that `verify` finds without checksums.
        slowest_s: The longest time in seconds.
        findings: Anything else, which is a bug.
    """

    named: int = 0
    refused: int = 0
    unaffected: int = 0
    unnoticed: int = 0
    found: int = 0
    found_alone: int = 0
    slowest_s: float = 0.0
    findings: list[str] = field(default_factory=list)


def models(folder: Path) -> list[Model]:
    """Write one model in each format, with chat template, license and checksums."""
    meta = write_meta(folder / "Tiny-Instruct", params=PARAMS)
    found = []
    for form in FORMS:
        path = meta
        if form != "meta":
            path = folder / form / ("Tiny-Instruct.gguf" if form == "gguf" else "Tiny-Instruct")
            path.parent.mkdir()
            convert(meta, path, form)
        sums = write_checksums(path)
        files = sorted(path.iterdir()) if path.is_dir() else [path, sums]
        found.append(Model(form, path, files))
    return found


def places(size: int, count: int, generator: random.Random) -> list[int]:
    """Choose up to `count` different offsets below `size`.

    Both ends are included; half of the rest is near them and half anywhere.

    Args:
        size: Number of offsets.
        count: Number to choose.
        generator: Source of randomness.
    """
    if size <= count:
        return list(range(size))
    ends = [*range(min(size, _ENDS)), *range(max(0, size - _ENDS), size)]
    chosen = dict.fromkeys([0, 1, size - 1])
    while len(chosen) < count:
        near = len(chosen) % 2 == 0 and len(chosen) < len(set(ends))
        chosen[generator.choice(ends) if near else generator.randrange(size)] = None
    return sorted(list(chosen)[:count])


def truncations(data: bytes, count: int, generator: random.Random) -> Iterator[tuple[str, bytes]]:
    """Truncated versions of a file, each with a description."""
    for place in places(len(data), count, generator):
        yield f"cut at byte {place}", data[:place]


def flips(data: bytes, count: int, generator: random.Random) -> Iterator[tuple[str, bytes]]:
    """Versions of a file with one flipped bit, each with a description."""
    for bit in places(8 * len(data), count, generator):
        byte = bit // 8
        yield f"bit {bit % 8} of byte {byte}", data[:byte] + bytes([data[byte] ^ 1 << bit % 8]) + data[byte + 1 :]


def loaded(path: Path) -> dict[str, Any]:
    """Load a model and return all its parts by name."""
    llama = Llama.load(path, precision="fp32", device="cpu")
    tokenizer = llama.tokenizer
    return {
        "args": llama.args,
        "tokenizer": (tokenizer.ranks, tokenizer.special_tokens, tokenizer.pattern, tokenizer.bos_id),
        "stops": (tokenizer.stop_ids, tokenizer.unknown),
        "template": template_of(llama.chat),
        "weights": {name: _bits(weight) for name, weight in llama.engine.model.state_dict().items()},
        "logits": _bits(llama.logits(PROMPT)),
    }


def _bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor: NaN equals itself, and 0 differs from -0."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def damage(model: Model, file: Path, cases: Iterator[tuple[str, bytes]]) -> Outcome:
    """Load the model with each damaged version of a file, then restore the file."""
    whole, data, outcome = loaded(model.path), file.read_bytes(), Outcome()
    try:
        for what, damaged in cases:
            file.write_bytes(damaged)
            start = time.perf_counter()
            try:
                _judge(model, file, whole, outcome, what)
            except Exception as error:  # noqa: BLE001 - any other exception is a finding
                outcome.findings.append(f"{what}: {error!r}")
            outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - start)
    finally:
        file.write_bytes(data)
    if outcome.slowest_s > _PATIENCE:
        outcome.findings.append(f"one took {outcome.slowest_s:.1f} s")
    return outcome


def _judge(model: Model, file: Path, whole: dict[str, Any], outcome: Outcome, what: str) -> None:
    names_it = _names(file, verify(model.path))
    try:
        now = loaded(model.path)
    except LlamaScratchError as error:
        sentence = str(error)
        if not sentence.isprintable():
            outcome.findings.append(f"{what}: not a one-line message: {sentence}")
        if file.name in sentence:
            outcome.named += 1
            return
        outcome.refused += 1
        if not names_it:
            outcome.findings.append(f"{what}: neither the error nor verify names the file: {sentence}")
        return
    if now == whole:
        outcome.unaffected += 1
        return
    outcome.unnoticed += 1
    outcome.found += names_it
    outcome.found_alone += _names(file, _alone(model))
    if not names_it:
        differing = [part for part in whole if now[part] != whole[part]]
        outcome.findings.append(f"{what}: {' and '.join(differing)} changed, and verify found nothing")


def _names(file: Path, found: Verification) -> bool:
    """Whether a problem was found that names the file."""
    return any(f.result == "wrong" and (f.part == file.name or file.name in f.sentence) for f in found.findings)


def _alone(model: Model) -> Verification:
    """Run `verify` without the checksums."""
    sums = model.path / CHECKLIST if model.path.is_dir() else model.path.with_name(f"{model.path.name}.md5")
    aside = sums.with_name("aside")
    sums.rename(aside)
    try:
        return verify(model.path)
    finally:
        aside.rename(sums)


KINDS: dict[str, Callable[[bytes, int, random.Random], Iterator[tuple[str, bytes]]]] = {
    "truncated": truncations,
    "flipped": flips,
}


def run(folder: Path, form: str, counts: dict[str, int], seed: int) -> dict[str, dict[str, Outcome]]:
    """Damage every file of a model.

    Args:
        folder: A folder for the models.
        form: The format of the model.
        counts: Number of cases per kind of damage.
        seed: Random seed.

    Returns:
        File name → kind of damage → outcome.
    """
    torch.set_num_threads(1)
    model = next(model for model in models(folder) if model.form == form)
    found: dict[str, dict[str, Outcome]] = {}
    for file in model.files:
        generator = random.Random(f"{seed} {form} {file.name}")
        data = file.read_bytes()
        found[file.name] = {
            kind: damage(model, file, make(data, counts[kind], generator)) for kind, make in KINDS.items()
        }
        print(f"{form} {file.name}: done", file=sys.stderr)
        for kind, outcome in found[file.name].items():
            for finding in outcome.findings[:3]:
                print(f"{form} {file.name} {kind}: {finding}", file=sys.stderr)
    return found


def _run(form: str, counts: dict[str, int], seed: int) -> dict[str, dict[str, Outcome]]:
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), form, counts, seed)


def figures(found: dict[str, dict[str, dict[str, Outcome]]], seconds: float, seed: int) -> dict[str, Any]:
    """Totals and results per file, which docs/reliability.md shows.

    Args:
        found: Format → file name → kind of damage → outcome.
        seconds: Duration of the run.
        seed: Random seed of the run.
    """
    files = {f"{form}/{name}": kinds for form, names in found.items() for name, kinds in names.items()}
    total: Counter[str] = Counter()
    for kinds in files.values():
        for outcome in kinds.values():
            counted = {name: value for name, value in vars(outcome).items() if isinstance(value, int)}
            total.update(counted | {"findings": len(outcome.findings)})
    inputs = total["named"] + total["refused"] + total["unaffected"] + total["unnoticed"]
    return {
        "inputs": inputs,
        "seed": seed,
        "seconds": round(seconds),
        **total,
        "slowest_s": round(max(o.slowest_s for kinds in files.values() for o in kinds.values()), 2),
        "files": {
            name: {kind: vars(outcome) | {"slowest_s": round(outcome.slowest_s, 2)} for kind, outcome in kinds.items()}
            for name, kinds in files.items()
        },
    }


def main() -> int:
    """Damage all files, print and record the figures. Returns 1 if there are findings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--truncations", type=int, default=200, help="truncations per file (default: 200)")
    parser.add_argument("--flips", type=int, default=2000, help="flipped bits per file (default: 2,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="parallel processes (default: 2)")
    options = parser.parse_args()
    counts = {"truncated": options.truncations, "flipped": options.flips}
    print(f"seed {options.seed}", file=sys.stderr)
    start = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:  # a crash of a worker is raised here
        parts = pool.map(partial(_run, counts=counts, seed=options.seed), FORMS)
        found = dict(zip(FORMS, parts, strict=True))
    result = figures(found, time.perf_counter() - start, options.seed)
    write("damage", result)
    print(json.dumps(result, indent=2))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
