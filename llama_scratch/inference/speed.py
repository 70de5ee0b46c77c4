"""How fast a model runs on this machine, and how near that comes to what the memory allows.

Decoding one token reads every weight once and the whole cache, so no program can do it faster than the
memory delivers them. Reading a prompt reads the weights once for many tokens: there the arithmetic decides.
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

# What read_bandwidth reads: far more than any cache holds.
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
    """Measure a loaded model; plain values, times in seconds.

    prefill: lengths of prompts. decode_at: tokens in the cache where decoding begins. tokens: decoded in each
    measurement. runs: how often each is measured; the median counts. Sizes that the context has no room for
    are left out, and named in `left_out`. All numbers are at least 1.
    """
    prompts = [size for size in prefill if size <= llama.context]
    contexts = [size for size in decode_at if size + tokens <= llama.context]
    start = time.perf_counter()
    llama.prepare(progress)
    prepare_s = time.perf_counter() - start
    timed(llama, random_ids(llama.args.vocab_size, 2, seed=0), 1)  # what only a first call does
    read = _time_prefill(llama, prompts, runs, progress)
    decoded = _time_decode(llama, contexts, tokens, runs, progress)
    peak = peak_memory()  # before the bandwidth, whose own buffer is no part of the model
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
    """Bytes that the threads in use read a second from `size` bytes, the median of several runs.

    The product of a vector with itself reads each byte once and computes next to nothing.
    """
    require_memory(size, "Measuring the bandwidth")
    numbers = torch.ones(size // 4)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        torch.dot(numbers, numbers)
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / median(seconds[1:])  # the first one may wake the threads


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """Ids that serve as a text; those of two seeds differ in the first, so that no cache serves both."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(vocab_size, (count,), generator=generator).tolist()
    return [seed % vocab_size, *ids[1:]]


def timed(llama: LoadedModel, ids: Sequence[int], new: int) -> tuple[float, float]:
    """Seconds for reading all but the last `new` of `ids`, and for the others one by one."""
    engine, first = llama.engine, len(ids) - new
    start = time.perf_counter()
    engine.next_logits(ids[:first])
    read = time.perf_counter()
    for end in range(first + 1, len(ids) + 1):
        engine.next_logits(ids[:end])
    return read - start, time.perf_counter() - read


def _time_prefill(llama: LoadedModel, sizes: Sequence[int], runs: int, progress: Progress) -> dict[int, float]:
    """Size → median seconds of reading a prompt. The sizes take turns."""
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
    """Context → median seconds a token. The context is read once; every run goes on from it with other tokens."""
    seconds: dict[int, float] = {}
    for context in contexts:
        before = random_ids(llama.args.vocab_size, context, seed=0)
        stage = f"decoding at {context:,} tokens"
        progress(stage, 0, runs)
        llama.engine.next_logits(before, progress)
        times = []
        for run in range(runs):
            progress(stage, run, runs)
            behind = random_ids(llama.args.vocab_size, tokens, seed=run)
            times.append(timed(llama, before + behind, tokens)[1] / tokens)
        seconds[context] = median(times)
    return seconds


def peak_memory() -> int:
    """The most bytes that this process ever had in memory, mapped pages of files among them."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- What it means ----------------------------------------------------------------------------


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
    """Multiplications and additions for one token behind `context` others."""
    return 2 * args.linear_parameters() + _attention_flops(args, context + 1)


def prefill_flops(args: ModelArgs, tokens: int) -> int:
    """The same for a whole prompt; only its last token goes through the output projection."""
    output = args.dim * args.vocab_size
    pairs = tokens * (tokens + 1) // 2  # each token looks at itself and at all before it
    return 2 * ((args.linear_parameters() - output) * tokens + output) + _attention_flops(args, pairs)


def _attention_flops(args: ModelArgs, pairs: int) -> int:
    """Query times key and share times value, for each layer, head and pair of tokens."""
    return 4 * args.n_layers * args.n_heads * args.head_dim * pairs
