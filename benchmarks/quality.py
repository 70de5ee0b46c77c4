"""How far each precision's answers are from float32's, ours and llama.cpp's, on the same weights and the same text.

    make quality        (python -m benchmarks.quality)

The weights are SmolLM2's, dequantised to float32. The text is the language reference that comes with Python
(`pydoc_data.topics`), in windows of 1,024 tokens, each read from an empty context. After every token the
reference is our fp32; what counts is the Kullback-Leibler divergence of the answer from the reference's, in
nats, and how often both have the same most probable token.

Writes benchmarks/quality.json and the section in benchmarks/results.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines import quiet_llama_cpp
from benchmarks.files import make_gguf, once, quantize_gguf
from benchmarks.report import FOLDER, quality_bounds, versions, write_report
from llama_scratch import Llama
from llama_scratch.checkpoint.find import find_model

PRECISIONS = ("fp16", "bf16", "int8")
PEERS = ("F32", "BF16", "Q8_0")
# Rows that are compared at once: in float64 a row of SmolLM2's logits takes 0.4 MB.
ROWS = 128

Logits = Callable[[Sequence[int]], Tensor]
"""Ids → the logits after each of them, (T, vocab_size) float32."""


@dataclass
class Distance:
    """Sums over all the tokens compared so far."""

    tokens: int = 0
    kl: float = 0.0
    same_top: int = 0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Compare two (T, vocab_size) tensors of logits."""
        for start in range(0, len(reference), ROWS):
            p, q = reference[start : start + ROWS], other[start : start + ROWS]
            p_log, q_log = p.double().log_softmax(-1), q.double().log_softmax(-1)
            self.kl += float((p_log.exp() * (p_log - q_log)).sum())
            self.same_top += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.tokens += len(reference)

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return self.kl / self.tokens

    @property
    def same_top_share(self) -> float:
        """Share of tokens after which both have the same most probable one."""
        return self.same_top / self.tokens


def text() -> str:
    """Some 465,000 characters of English prose and a little code; the same for each version of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(ids: Sequence[int], size: int, tokens: int) -> list[Sequence[int]]:
    """The first windows of `size` ids that have `tokens` ids together, or all that there are."""
    count = min(-(-tokens // size), len(ids) // size)
    return [ids[i * size : (i + 1) * size] for i in range(count)]


def compare(reference: Logits, others: dict[str, Logits], texts: list[Sequence[int]]) -> dict[str, Distance]:
    """Run all over each text in turn, so that only two tensors of logits are held at a time."""
    distances = {name: Distance() for name in others}
    for number, ids in enumerate(texts, start=1):
        expected = reference(ids)
        for name, logits in others.items():
            distances[name].add(expected, logits(ids))
        print(f"{number}/{len(texts)} windows", end="\r", flush=True)
    print()
    return distances


def our_logits(model: Path, precision: str) -> Logits:
    """One of our precisions, its weights in their final form."""
    llama = Llama.load(model, precision=precision)
    llama.prepare()
    return llama.logits


def llama_cpp_logits(path: Path, context: int) -> Logits:
    """llama.cpp on a GGUF file; it gets ids, so that tokenizers play no part."""
    import llama_cpp

    quiet_llama_cpp()
    llama = llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=context, n_ubatch=min(512, context), logits_all=True, verbose=False
    )

    def logits(ids: Sequence[int]) -> Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.from_numpy(llama.scores[: len(ids)])

    return logits


def measure(
    model: Path, directory: Path, precisions: Sequence[str], peers: Sequence[str], *, size: int, tokens: int
) -> dict[str, Any]:
    """What quality.json holds."""
    llama = Llama.load(model, precision="fp32")
    texts = windows(llama.encode(text()), size, tokens)
    others = {f"ours {precision}": our_logits(model, precision) for precision in precisions}
    if peers:
        f32 = once(directory / f"{llama.info.name}-F32.gguf", lambda path: make_gguf(model, path, torch.float32))
        for kind in peers:
            path = f32 if kind == "F32" else directory / f"{llama.info.name}-{kind}.gguf"
            once(path, lambda target, kind=kind: quantize_gguf(f32, target, kind))  # type: ignore[misc]
            others[f"llama.cpp {kind}"] = llama_cpp_logits(path, size)
    gc.collect()
    distances = compare(llama.logits, others, texts)
    return {
        "model": llama.info.name,
        "text": f"pydoc_data.topics of Python {platform.python_version()}",
        "tokens": sum(map(len, texts)),
        "window": size,
        "versions": versions(),
        "distances": {
            name: {"mean_kl": distance.mean_kl, "same_top": distance.same_top_share}
            for name, distance in distances.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and say which bounds are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model's name or path (smollm2)")
    parser.add_argument("--tokens", type=int, default=20_480, help="tokens of text (20,480)")
    parser.add_argument("--window", type=int, default=1024, help="tokens that are read from an empty context (1,024)")
    parser.add_argument("--precisions", nargs="*", default=PRECISIONS, help="ours (fp16 bf16 int8)")
    parser.add_argument("--peers", nargs="*", default=PEERS, help="llama.cpp's (F32 BF16 Q8_0)")
    parser.add_argument("--directory", type=Path, default=Path(".cache/benchmark"), help="where models are written")
    parser.add_argument("--output", type=Path, default=FOLDER, help="where quality.json and results.md are written")
    options = parser.parse_args(arguments)
    if options.peers and importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is left out, because llama-cpp-python is not installed; 'make quality' installs it.")
        options.peers = []
    quality = measure(
        find_model(options.model),
        options.directory,
        options.precisions,
        options.peers,
        size=options.window,
        tokens=options.tokens,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    write_report(options.output)
    for name, distance in quality["distances"].items():
        print(f"{name}: mean KL {distance['mean_kl']:.2e} nats, same top-1 {distance['same_top']:.2%}")
    for bound in quality_bounds(quality):
        print(bound)


if __name__ == "__main__":
    main()
