"""Benchmark a model on this machine, relative to the memory bandwidth.

Decoding is memory-bound: each token reads every weight and the whole KV cache, so the bandwidth limits the speed.
Prefill reads the weights once for many tokens and is compute-bound.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from llama_scratch.config import ModelArgs
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.precision.dtypes import activation_bytes
from llama_scratch.system.memory import require_memory
from llama_scratch.system.progress import Progress, silent

# Size of the array for read_bandwidth: far larger than any CPU cache.
BANDWIDTH_BYTES = 1_000_000_000


def measure(
    llama: LoadedModel,
    *,
    prefill: Sequence[int] = (128, 512, 2048),
    decode_at: Sequence[int] = (16, 8192),
    tokens: int = 16,
    runs: int = 3,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Benchmark a loaded model.

    Args:
        llama: The model.
        prefill: Prompt lengths in tokens, at least 1.
        decode_at: Numbers of cached tokens at the start of decoding, at least 1.
        tokens: Tokens to decode per measurement, at least 1.
        runs: Measurements per size, at least 1. The result is their median.
        progress: Called with a stage, the amount done and the total.

    Returns:
        A dictionary of plain values, with times in seconds. `left_out` lists sizes that do not fit into the context.
    """
    prompts = [size for size in prefill if size <= llama.context]
    contexts = [size for size in decode_at if size + tokens <= llama.context]
    start = time.perf_counter()
    llama.prepare(progress)
    prepare_s = time.perf_counter() - start
    timed(llama, random_ids(llama.args.vocab_size, 2, seed=0), 1)  # warm-up
    read = _time_prefill(llama, prompts, runs, progress)
    decoded = _time_decode(llama, contexts, tokens, runs, progress)
    peak = peak_memory()  # before `read_bandwidth`, whose buffer must not count
    bandwidth = read_bandwidth(BANDWIDTH_BYTES, max(3, runs))
    return {
        "model": asdict(llama.info),
        "threads": torch.get_num_threads(),
        "runs": runs,
        "tokens": tokens,
        "bandwidth": bandwidth,
        "load_s": llama.load_s,
        "prepare_s": prepare_s,
        "peak_bytes": peak,
        "weight_bytes": llama.weight_bytes,
        "prefill": [_prefill(llama.args, size, read[size]) for size in prompts],
        "decode": [_decode(llama, size, decoded[size], bandwidth) for size in contexts],
        "left_out": {
            "prefill": [size for size in prefill if size not in prompts],
            "decode": [size for size in decode_at if size not in contexts],
        },
        "context": llama.context,
    }


# --- Measuring --------------------------------------------------------------------------------


def read_bandwidth(size: int, runs: int = 3) -> float:
    """Measure the memory's read bandwidth with torch's threads.

    The dot product of a vector with itself reads each byte once and is memory-bound.

    Args:
        size: Size of the vector in bytes.
        runs: Number of measurements. The result is their median.

    Returns:
        Bytes per second.
    """
    require_memory(size, "Measuring the bandwidth")
    numbers = torch.ones(size // 4)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        torch.dot(numbers, numbers)
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / median(seconds[1:])  # the first run may start the threads


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """Return random token ids.

    The first id is the seed, so sequences with different seeds have no common prefix in the cache.

    Args:
        vocab_size: Size of the vocabulary.
        count: Number of ids.
        seed: Random seed.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(vocab_size, (count,), generator=generator).tolist()
    return [seed % vocab_size, *ids[1:]]


def timed(llama: LoadedModel, ids: Sequence[int], new: int) -> tuple[float, float]:
    """Time a forward pass over a prompt, then decoding token by token.

    Args:
        llama: The model.
        ids: Prompt and continuation.
        new: Number of tokens in the continuation.

    Returns:
        Seconds for the prompt and for the continuation.
    """
    engine, first = llama.engine, len(ids) - new
    start = time.perf_counter()
    engine.next_logits(ids[:first])
    read = time.perf_counter()
    for end in range(first + 1, len(ids) + 1):
        engine.next_logits(ids[:end])
    return read - start, time.perf_counter() - read


def _time_prefill(llama: LoadedModel, sizes: Sequence[int], runs: int, progress: Progress) -> dict[int, float]:
    """Return size → median seconds to read a prompt. Sizes are interleaved."""
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    done, total = 0, runs * sum(seconds)
    for run in range(runs):
        for size, times in seconds.items():
            progress(f"reading {size:,} tokens", done, total)
            times.append(timed(llama, random_ids(llama.args.vocab_size, size, seed=1 + run), 0)[0])
            done += size
    return {size: median(times) for size, times in seconds.items()}


def _time_decode(
    llama: LoadedModel, contexts: Sequence[int], tokens: int, runs: int, progress: Progress
) -> dict[int, float]:
    """Return context → median seconds per token.

    The context is read once, and each run continues it with other tokens.
    """
    seconds: dict[int, float] = {}
    for context in contexts:
        before = random_ids(llama.args.vocab_size, context, seed=0)
        stage = f"decoding at {context:,} tokens"
        progress(stage, 0, runs)
        llama.engine.next_logits(before, progress)
        times = []
        for run in range(runs):
            progress(stage, run, runs)
            continuation = random_ids(llama.args.vocab_size, tokens, seed=run)
            times.append(timed(llama, before + continuation, tokens)[1] / tokens)
        seconds[context] = median(times)
    return seconds


def peak_memory() -> int:
    """Return this process's peak resident memory in bytes, including mapped pages."""
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- Results ----------------------------------------------------------------------------------


def _prefill(args: ModelArgs, size: int, seconds: float) -> dict[str, Any]:
    flops = prefill_flops(args, size)
    return {
        "tokens": size,
        "seconds": seconds,
        "tokens_per_s": size / seconds,
        "flops": flops,
        "gflops_per_s": flops / seconds / 1e9,
    }


def _decode(llama: LoadedModel, context: int, seconds: float, bandwidth: float) -> dict[str, Any]:
    kv_bytes = context * llama.args.kv_bytes_per_token(activation_bytes(llama.engine.model))
    limit = bandwidth / (llama.weight_bytes + kv_bytes)
    return {
        "context": context,
        "seconds_per_token": seconds,
        "tokens_per_s": 1 / seconds,
        "kv_bytes": kv_bytes,
        "flops": decode_flops(llama.args, context),
        "limit_tokens_per_s": limit,
        "share_of_limit": 1 / seconds / limit,
    }


def decode_flops(args: ModelArgs, context: int) -> int:
    """Return the FLOP for one token after `context` others.

    Args:
        args: The network's dimensions.
        context: Number of tokens in the cache.
    """
    return 2 * args.linear_parameters() + _attention_flops(args, context + 1)


def prefill_flops(args: ModelArgs, tokens: int) -> int:
    """Return the FLOP for a whole prompt.

    Only the last token goes through the output projection.

    Args:
        args: The network's dimensions.
        tokens: Length of the prompt.
    """
    output = args.dim * args.vocab_size
    pairs = tokens * (tokens + 1) // 2  # each token attends to itself and all earlier ones
    return 2 * ((args.linear_parameters() - output) * tokens + output) + _attention_flops(args, pairs)


def _attention_flops(args: ModelArgs, pairs: int) -> int:
    """FLOP of query · key and weight · value, for each layer, head and pair of tokens."""
    return 4 * args.n_layers * args.n_heads * args.head_dim * pairs
