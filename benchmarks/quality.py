"""Measure the accuracy of each precision, ours and llama.cpp's, relative to fp32.

    make quality        (python -m benchmarks.quality, and again with --rotate)

The weights are SmolLM2's, dequantized to float32. The text is the language reference that comes with Python
(`pydoc_data.topics`), in windows of 1,024 tokens, each with an empty cache. The reference is our fp32. For each token
the benchmark measures the Kullback-Leibler divergence from the reference in nats, whether the most likely token is the
same, and the surprisal of the next token, whose mean gives the perplexity.

--rotate uses the same network with rotated weights (see `rotate`). SmolLM2's weights are on a 4-bit grid, which a 4-bit
format may represent exactly by chance. Rotated weights are not on a grid.

Writes benchmarks/quality.json, or quality_rotated.json, and the section in benchmarks/results.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines import quiet_llama_cpp
from benchmarks.files import make_gguf, once, quantize_gguf
from benchmarks.machine import machine
from benchmarks.report import FOLDER, versions, write_report
from benchmarks.rotate import make_rotated
from benchmarks.sections.quality import quality_bounds
from benchmarks.sections.quality_rotated import rotated_bounds
from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.config import EMBEDDING
from llama_scratch.download.locate import find_model
from llama_scratch.precision.calibration import collect_hessians
from llama_scratch.precision.lazy_weight import as_tensor
from llama_scratch.precision.linear import format_of
from llama_scratch.system.progress import silent

# For the original weights, and for rotated weights.
_PRECISIONS = ("fp16", "bf16", "int8"), ("int8", "int4")
_PEERS = ("F32", "BF16", "Q8_0"), ("Q8_0", "Q4_0", "Q4_1")
_TOKENS = 20_480, 51_200
# Number of rows to compare at a time. In float64, a row of SmolLM2's logits takes 0.4 MB.
ROWS = 128

Logits = Callable[[Sequence[int]], Tensor]
"""Token ids → logits after each of them, (T, vocab_size) float32."""


@dataclass(frozen=True)
class Engine:
    """Logits function of an engine, and average bits per weight.

    The average is over the linear layers and includes scales.
    """

    logits: Logits
    bits: float


@dataclass
class Distance:
    """Sums over all tokens compared so far."""

    tokens: int = 0
    kl: float = 0.0
    same_top: int = 0
    followed: int = 0
    surprise: float = 0.0

    def add(self, reference: Tensor, other: Tensor, ids: Sequence[int] = ()) -> None:
        """Compare two tensors of logits.

        Args:
            reference: Logits of the reference, (T, vocab_size).
            other: Logits to compare, (T, vocab_size).
            ids: The T tokens before the logits, for the perplexity.
        """
        following = torch.tensor(ids[1:], dtype=torch.long)
        for start in range(0, len(reference), ROWS):
            p, q = reference[start : start + ROWS], other[start : start + ROWS]
            p_log, q_log = p.double().log_softmax(-1), q.double().log_softmax(-1)
            self.kl += float((p_log.exp() * (p_log - q_log)).sum())
            self.same_top += int((p.argmax(-1) == q.argmax(-1)).sum())
            next_ids = following[start : start + ROWS, None]
            self.surprise -= float(q_log[: len(next_ids)].gather(-1, next_ids).sum())
        self.tokens += len(reference)
        self.followed += len(following)

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence in nats per token."""
        return self.kl / self.tokens

    @property
    def same_top_share(self) -> float:
        """Share of positions with the same most likely token."""
        return self.same_top / self.tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean surprisal of the next token, in nats."""
        return math.exp(self.surprise / self.followed)


def text() -> str:
    """Return about 465,000 characters of English prose with some code.

    The text depends only on the Python version.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(ids: Sequence[int], size: int, tokens: int) -> list[Sequence[int]]:
    """Split token ids into complete windows.

    Args:
        ids: Token ids.
        size: Tokens per window.
        tokens: Number of tokens that the windows must cover, if `ids` is long enough.
    """
    count = min(-(-tokens // size), len(ids) // size)
    return [ids[i * size : (i + 1) * size] for i in range(count)]


def compare(reference: Logits, others: dict[str, Logits], texts: list[Sequence[int]]) -> dict[str, Distance]:
    """Compare engines with a reference, text by text.

    At most two tensors of logits are in memory at a time.

    Args:
        reference: The reference.
        others: Name → engine.
        texts: Token ids of the texts.
    """
    distances = {name: Distance() for name in others}
    for number, ids in enumerate(texts, start=1):
        expected = reference(ids)
        for name, logits in others.items():
            distances[name].add(expected, logits(ids), ids)
        print(f"{number}/{len(texts)} windows", end="\r", flush=True)
    print()
    return distances


def ours(model: Path, precision: str) -> Engine:
    """Load a model in one of our precisions, with packed weights.

    Args:
        model: The model.
        precision: The precision.
    """
    llama = Llama.load(model, precision=precision)
    llama.prepare()
    return Engine(llama.logits, 8 * llama.weight_bytes / llama.args.linear_parameters())


def peer(path: Path, context: int) -> Engine:
    """Load a GGUF file in llama.cpp. Its tokenizer is not used.

    Args:
        path: The file.
        context: Size of the context in tokens.
    """
    import llama_cpp

    quiet_llama_cpp()
    llama = llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=context, n_ubatch=min(512, context), logits_all=True, verbose=False
    )

    def logits(ids: Sequence[int]) -> Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.from_numpy(llama.scores[: len(ids)])

    checkpoint = open_checkpoint(path)
    weights = checkpoint.load(silent)
    read = sum(weight.nbytes for name, weight in weights.items() if len(weight.shape) == 2 and name != EMBEDDING)
    return Engine(logits, 8 * read / checkpoint.args.linear_parameters())


def measure(
    model: Path, directory: Path, precisions: Sequence[str], peers: Sequence[str], *, size: int, tokens: int
) -> dict[str, Any]:
    """Measure all precisions and peers.

    Args:
        model: The model.
        directory: Folder for llama.cpp's files.
        precisions: Our precisions.
        peers: llama.cpp's types.
        size: Tokens per window.
        tokens: Number of tokens of text.

    Returns:
        The content of quality.json.
    """
    llama = Llama.load(model, precision="fp32")
    texts = windows(llama.encode(text()), size, tokens)
    engines = {f"ours {precision}": ours(model, precision) for precision in precisions}
    for kind in peers:
        engines[f"llama.cpp {kind}"] = peer(quantized(model, directory, kind), size)
    gc.collect()
    others = {"ours fp32": llama.logits} | {name: engine.logits for name, engine in engines.items()}
    distances = compare(llama.logits, others, texts)
    return {
        "model": llama.info.name,
        "text": f"pydoc_data.topics of Python {platform.python_version()}",
        "tokens": sum(map(len, texts)),
        "window": size,
        "versions": versions(),
        "machine": machine(),
        "perplexity": distances.pop("ours fp32").perplexity,
        "distances": {
            name: {
                "mean_kl": distance.mean_kl,
                "same_top": distance.same_top_share,
                "perplexity": distance.perplexity,
                "bits": engines[name].bits,
            }
            for name, distance in distances.items()
        },
    }


def quantized(model: Path, directory: Path, kind: str, *, pure: bool = False) -> Path:
    """Quantize a model with llama.cpp, unless the file exists.

    Args:
        model: The model.
        directory: Folder of the files.
        kind: llama.cpp's name of the type.
        pure: See `quantize_gguf`.

    Returns:
        The path of the file.
    """
    name = open_checkpoint(model).name
    f32 = once(directory / f"{name}-F32.gguf", lambda path: make_gguf(model, path, torch.float32))
    if kind == "F32":
        return f32
    target = directory / f"{name}-{'only-' * pure}{kind}.gguf"
    return once(target, lambda path: quantize_gguf(f32, path, kind, pure=pure))


# --- Errors of w2 -----------------------------------------------------------------------------

# Types with blocks of 256 weights. SmolLM2's rows of 1,536 weights are a multiple of that, its rows of 576 are not.
K_TYPES = ("Q4_K_S", "Q6_K")


def w2_errors(
    model: Path, directory: Path, precisions: Sequence[str], peers: Sequence[str], texts: list[Sequence[int]]
) -> dict[str, dict[str, float]]:
    """Measure the mean quantization error of the w2 matrices in each format.

    Args:
        model: The model.
        directory: Folder for llama.cpp's files.
        precisions: Our precisions.
        peers: llama.cpp's types.
        texts: Token ids of texts, which define the inputs X of w2.

    Returns:
        For each engine: `bits` per weight, `weight` error ‖W − Ŵ‖² / ‖W‖², and `output` error
        ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖².
    """
    names = [f"layers.{i}.feed_forward.w2" for i in range(open_checkpoint(model).args.n_layers)]
    llama = Llama.load(model, precision="fp32")
    inputs = collect_hessians(llama.engine.model, [torch.tensor([ids]) for ids in texts])
    seen = {name: products for (name, *_), products in inputs if name in names}
    exact = _w2(llama, names)
    found = {}
    for precision in precisions:
        coded = Llama.load(model, precision=precision)
        coded.prepare()
        forms = filter(None, (format_of(coded.engine.model.get_submodule(name)) for name in names))
        found[f"ours {precision}"] = sum(form.nbytes for form in forms), _w2(coded, names)
    for kind in peers:
        weights = open_checkpoint(quantized(model, directory, kind, pure=True)).load(silent)
        held = {name: weights[f"{name}.weight"] for name in names}
        size = sum(weight.nbytes for weight in held.values())
        found[f"llama.cpp {kind}"] = size, {name: as_tensor(weight) for name, weight in held.items()}
    return {
        engine: {
            "bits": 8 * size / sum(weight.numel() for weight in exact.values()),
            "weight": fmean(_share(exact[name], weights[name], torch.eye(len(seen[name]))) for name in names),
            "output": fmean(_share(exact[name], weights[name], seen[name]) for name in names),
        }
        for engine, (size, weights) in found.items()
    }


def _w2(llama: Llama, names: Sequence[str]) -> dict[str, Tensor]:
    """Weights of layers as they act in any format: the outputs for unit vectors."""
    units = torch.eye(llama.args.ffn_dim)
    return {name: llama.engine.model.get_submodule(name)(units).T for name in names}


def _share(exact: Tensor, coded: Tensor, H: Tensor) -> float:
    """Relative error E[((w − ŵ)·x)²] ÷ E[(w·x)²] over all rows w, with H = E[x xᵀ]."""
    e = exact - coded
    return float(((e @ H) * e).sum() / ((exact @ H) * exact).sum())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, record, and print the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="name or path of a model (default: smollm2)")
    parser.add_argument(
        "--rotate",
        action="store_true",
        help="rotate the residual stream, so that the weights are not on a quantization grid",
    )
    parser.add_argument("--tokens", type=int, help="tokens of text (default: 20,480; with --rotate 51,200)")
    parser.add_argument("--window", type=int, default=1024, help="tokens per window (default: 1,024)")
    parser.add_argument("--precisions", nargs="*", help="ours (default: fp16 bf16 int8; with --rotate int8 int4)")
    parser.add_argument("--peers", nargs="*", help="llama.cpp's (default: F32 BF16 Q8_0; with --rotate Q8_0 Q4_0 Q4_1)")
    parser.add_argument("--directory", type=Path, default=Path(".cache/benchmark"), help="folder for the model files")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the .json file and results.md")
    options = parser.parse_args(arguments)
    precisions = options.precisions if options.precisions is not None else _PRECISIONS[options.rotate]
    peers = options.peers if options.peers is not None else _PEERS[options.rotate]
    if peers and importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is not measured, because llama-cpp-python is not installed. 'make quality' installs it.")
        peers = []
    model = find_model(options.model)
    if options.rotate:
        name = open_checkpoint(model).name
        model = once(options.directory / f"{name}-rotated.gguf", lambda target: make_rotated(model, target))
    size, tokens = options.window, options.tokens or _TOKENS[options.rotate]
    quality = measure(model, options.directory, precisions, peers, size=size, tokens=tokens)
    if options.rotate:
        texts = windows(Llama.load(model, precision="fp32").encode(text()), size, 4 * size)
        quality["w2"] = w2_errors(model, options.directory, precisions, [*peers, *K_TYPES] if peers else [], texts)
    options.output.mkdir(parents=True, exist_ok=True)
    file = "quality_rotated.json" if options.rotate else "quality.json"
    (options.output / file).write_text(json.dumps(quality, indent=1) + "\n")
    write_report(options.output)
    for name, distance in quality["distances"].items():
        print(f"{name}: mean KL {distance['mean_kl']:.2e} nats, same top-1 {distance['same_top']:.2%}")
    for bound in rotated_bounds(quality) if options.rotate else quality_bounds(quality):
        print(bound)


if __name__ == "__main__":
    main()
