"""The common mistakes, as wrong versions of the functions in `solution`.

A reader's function that gives the same wrong results has the same mistake, and the check says so by its name. " Paris"
proves nothing: with the wrong θ, or without any rotation, the network still predicts it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llama_scratch.learn import solution


@dataclass(frozen=True)
class Mistake:
    """A wrong version of a function.

    Args:
        function: Name of the function in `solution`.
        sentence: What is wrong, as a sentence.
        wrong: The wrong version.
    """

    function: str
    sentence: str
    wrong: Callable[..., Any]


# Functions that a longer function calls, whose mistakes it inherits.
USES = {
    "grouped_attention": ("attention",),
    "block": ("rms_norm", "attention", "rotate", "grouped_attention", "feed_forward"),
    "forward": (
        "embed", "rms_norm", "attention", "frequencies", "rotations", "rotate", "scaled_frequencies",
        "grouped_attention", "feed_forward", "block",
    ),
}  # fmt: skip


def mistakes_of(function: str) -> Iterator[Mistake]:
    """Yield the known mistakes of a function, and those that it inherits from the functions it calls."""
    yield from (mistake for mistake in MISTAKES if mistake.function == function)
    for mistake in MISTAKES:
        if mistake.function in USES.get(function, ()):
            yield Mistake(function, mistake.sentence, getattr(solution_with(mistake), function))


@cache
def solution_with(mistake: Mistake) -> Any:
    """Load the solution again, with a wrong version in place of one function."""
    spec = importlib.util.spec_from_file_location("solution_with_mistake", solution.__file__)
    if spec is None or spec.loader is None:
        raise ImportError(solution.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    setattr(module, mistake.function, mistake.wrong)
    return module


# --- Wrong versions -----------------------------------------------------------------------------


def _softmax_without_maximum(logits: Tensor) -> Tensor:
    return torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)


def _entropy_with_zeros(p: Tensor) -> float:
    return float(-(p * p.log2()).sum())


def _bpe_longest(word: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    ids = []
    while word:
        end = next(end for end in range(len(word), 0, -1) if word[:end] in ranks)
        ids.append(ranks[word[:end]])
        word = word[end:]
    return ids


def _bpe_leftmost(word: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    parts = [word[i : i + 1] for i in range(len(word))]
    i = 0
    while i + 1 < len(parts):
        if parts[i] + parts[i + 1] in ranks:
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            i = 0
        else:
            i += 1
    return [ranks[part] for part in parts]


def _attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: int | None = 1) -> Tensor:
    """Attention with another scale, or with another diagonal of the mask (None: without a mask)."""
    scores = q @ k.T / (math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        future = torch.ones_like(scores, dtype=torch.bool).triu(mask)
        scores = scores.masked_fill(future, -math.inf)
    return solution.softmax(scores) @ v


def _rotate_halves(x: Tensor, freqs_cis: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * freqs_cis[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def _tiled_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = k.shape[1]
    heads = [solution.attention(q[:, head], k[:, head % n], v[:, head % n]) for head in range(q.shape[1])]
    return torch.stack(heads, dim=1)


def _feed_forward(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    return (act(x @ w1.T) * (x @ w3.T)) @ w2.T


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _block(
    x: Tensor, w: Mapping[str, Tensor], freqs_cis: Tensor, args: Any, *, residual: bool = True,
    normed: bool = True, parallel: bool = False, rotated: tuple[bool, bool] = (True, True), swapped: bool = False,
) -> Tensor:  # fmt: skip
    """One layer with a part left out or moved."""
    names = ["attention_norm.weight", "ffn_norm.weight"]
    first, second = reversed(names) if swapped else names
    h = solution.rms_norm(x, w[first], args.norm_eps)
    q, k, v = ((h @ w[f"attention.{name}.weight"].T).reshape(len(h), -1, args.head_dim) for name in ("wq", "wk", "wv"))
    q, k = (solution.rotate(y, freqs_cis) if turn else y for y, turn in zip((q, k), rotated, strict=True))
    added = solution.grouped_attention(q, k, v).flatten(-2) @ w["attention.wo.weight"].T
    after = x + added if residual else added
    source = x if parallel else after
    h = solution.rms_norm(source, w[second], args.norm_eps) if normed else source
    out = solution.feed_forward(h, *(w[f"feed_forward.{name}.weight"] for name in ("w1", "w2", "w3")))
    return after + out if residual else out


def _forward_without_norm(ids: Tensor, weights: Mapping[str, Tensor], args: Any) -> Tensor:
    freqs_cis = solution.rotations(solution.frequencies(args.head_dim, args.rope_theta), len(ids))
    x = weights["tok_embeddings.weight"][ids]
    for layer in range(args.n_layers):
        x = solution.block(x, solution.layer_weights(weights, layer), freqs_cis, args)
    return x @ weights["output.weight"].T


def _cached_top_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.T / math.sqrt(q.shape[-1])
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return solution.softmax(scores.masked_fill(future, -math.inf)) @ v


def _cached_without_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return solution.softmax(q @ k.T / math.sqrt(q.shape[-1])) @ v


def _nucleus_too_small(
    logits: Tensor, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> Tensor:
    p = solution.distribution(logits, temperature, top_k, 1, 0)
    ordered, order = p.sort(descending=True)
    keep = torch.empty_like(p, dtype=torch.bool)
    keep[order] = ordered.cumsum(-1) <= top_p
    keep[order[0]] = True
    return _filtered(p, keep if top_p < 1 else torch.ones_like(keep), min_p)


def _temperature_last(
    logits: Tensor, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> Tensor:
    p = solution.distribution(logits, 1, top_k, top_p, min_p) ** (1 / temperature)
    return p / p.sum()


def _min_p_absolute(
    logits: Tensor, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> Tensor:
    p = solution.distribution(logits, temperature, top_k, top_p, 0)
    keep = p >= min_p
    keep[p.argmax()] = True
    return _filtered(p, keep, 0)


def _multiplied_temperature(
    logits: Tensor, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> Tensor:
    return solution.distribution(logits, 1 / temperature, top_k, top_p, min_p)


def _filtered(p: Tensor, keep: Tensor, min_p: float) -> Tensor:
    p = p * keep
    p = p * (p >= min_p * p.max())
    return p / p.sum()


def _one_scale(x: Tensor, block: int = 32) -> tuple[Tensor, Tensor]:
    scale = x.abs().max() / 127
    return (x / scale).round().to(torch.int8), scale.expand(len(x) // block).clone()


def _truncated(x: Tensor, block: int = 32) -> tuple[Tensor, Tensor]:
    scales = solution.quantize(x, block)[1]
    return (x.reshape(-1, block) / scales.clamp_min(1e-30)[:, None]).to(torch.int8).flatten(), scales


def _overflowing(q_w: Tensor, s_w: Tensor, q_x: Tensor, s_x: Tensor) -> float:
    sums = (q_w * q_x).reshape(len(s_w), -1).sum(-1)
    return float((sums * s_w * s_x).sum())


def _cost(args: Any, bits: float, bandwidth: float, tokens: int = 0, *, heads: int, embedding: bool = False) -> float:
    weights = args.linear_parameters() + embedding * args.vocab_size * args.dim
    return float(bandwidth / (weights * bits / 8 + tokens * 2 * args.n_layers * heads * args.head_dim * 4))


MISTAKES = (
    Mistake("softmax", "The maximum is not subtracted first, so e^x overflows for large logits.",
            _softmax_without_maximum),
    Mistake("softmax", "The probabilities are normalized over the whole tensor. Normalize the last axis.",
            lambda x: torch.exp(x - x.max()) / torch.exp(x - x.max()).sum()),
    Mistake("entropy", "The entropy is in nats. Use the logarithm to base 2 for bits.",
            lambda p: solution.entropy(p) * math.log(2)),
    Mistake("entropy", "A probability of 0 gives NaN, because 0 · log 0 is NaN. Leave out the zeros.",
            _entropy_with_zeros),
    Mistake("bpe", "The longest token that fits is taken first. BPE merges the pair with the lowest rank first.",
            _bpe_longest),
    Mistake("bpe", "The leftmost pair is merged first. BPE merges the pair with the lowest rank first.",
            _bpe_leftmost),
    Mistake("embed", "The embedding is multiplied by √dim. Other models do that; Llama does not.",
            lambda ids, table: table[ids] * math.sqrt(table.shape[1])),
    Mistake("rms_norm", "The mean is subtracted. That is layer norm; RMSNorm does not.",
            lambda x, w, eps: solution.rms_norm(x - x.mean(-1, keepdim=True), w, eps)),
    Mistake("rms_norm", "The square root is missing: x is divided by its mean square.",
            lambda x, w, eps: x / (x.square().mean(-1, keepdim=True) + eps) * w),
    Mistake("rms_norm", "The sum of squares is used instead of the mean of squares.",
            lambda x, w, eps: x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * w),
    Mistake("rms_norm", "The mean is taken over all tokens. Each token is normalized alone.",
            lambda x, w, eps: x / (x.square().mean() + eps).sqrt() * w),
    Mistake("rms_norm", "eps is added after the square root. It belongs below the root.",
            lambda x, w, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * w),
    Mistake("rms_norm", "The weight is used as 1 + weight. Gemma does that; Llama does not.",
            lambda x, w, eps: solution.rms_norm(x, 1 + w, eps)),
    Mistake("rms_norm", "The weight is missing.",
            lambda x, w, eps: solution.rms_norm(x, torch.ones_like(w), eps)),
    Mistake("attention", "The causal mask is missing: tokens see the tokens after them.",
            lambda q, k, v: _attention(q, k, v, mask=None)),
    Mistake("attention", "The mask also hides the token itself.",
            lambda q, k, v: _attention(q, k, v, mask=0)),
    Mistake("attention", "The scores are not divided by √head_dim.",
            lambda q, k, v: _attention(q, k, v, scale=1)),
    Mistake("attention", "The scores are divided by head_dim instead of its square root.",
            lambda q, k, v: _attention(q, k, v, scale=q.shape[-1])),
    Mistake("frequencies", "θ is always 10,000. Use the theta that the function is given.",
            lambda head_dim, theta: solution.frequencies(head_dim, 10_000)),
    Mistake("frequencies", "The exponent of pair j is j/head_dim. It is 2j/head_dim, from 0 to almost 1.",
            lambda head_dim, theta: theta ** (-torch.arange(head_dim // 2) / head_dim)),
    Mistake("rotations", "The first position is 1. It is 0, so that the first token is not rotated.",
            lambda freqs, T: solution.rotations(freqs, T + 1)[1:]),
    Mistake("rotations", "The rotation has the wrong direction: the angle is m·θ, not −m·θ.",
            lambda freqs, T: solution.rotations(freqs, T).conj().resolve_conj()),
    Mistake("rotate", "The first half of a head is paired with the second. Llama's weights pair neighbors.",
            _rotate_halves),
    Mistake("rotate", "Nothing is rotated: the network does not know the order of the tokens.",
            lambda x, freqs_cis: x),
    Mistake("scaled_frequencies", "Every frequency is divided. Fast ones are kept.",
            lambda f, factor, low, high, context: f / factor),
    Mistake("scaled_frequencies", "Fast frequencies are divided and slow ones kept. It is the other way round.",
            lambda f, factor, low, high, context:
            f + f / factor - solution.scaled_frequencies(f, factor, low, high, context)),
    Mistake("scaled_frequencies", "There is no blend: frequencies between the limits change abruptly.",
            lambda f, factor, low, high, context: torch.where(context * f / (2 * math.pi) < high, f / factor, f)),
    Mistake("grouped_attention", "The heads are tiled: query head i uses key head i mod n_kv_heads. "
            "Neighboring query heads share a key head: i // group.", _tiled_heads),
    Mistake("feed_forward", "The gate is missing: SiLU(w1·x) is not multiplied by w3·x.",
            lambda x, w1, w2, w3: _silu(x @ w1.T) @ w2.T),
    Mistake("feed_forward", "w1 and w3 are swapped. SiLU is applied to w1·x.",
            lambda x, w1, w2, w3: _feed_forward(x, w3, w2, w1, _silu)),
    Mistake("feed_forward", "The activation is the sigmoid. SiLU is x · sigmoid(x).",
            lambda x, w1, w2, w3: _feed_forward(x, w1, w2, w3, torch.sigmoid)),
    Mistake("feed_forward", "The activation is ReLU. SwiGLU uses SiLU.",
            lambda x, w1, w2, w3: _feed_forward(x, w1, w2, w3, torch.relu)),
    Mistake("feed_forward", "The activation is GELU. SwiGLU uses SiLU.",
            lambda x, w1, w2, w3: _feed_forward(x, w1, w2, w3, torch.nn.functional.gelu)),
    Mistake("block", "The residual stream is replaced. Each part adds its output to it.",
            lambda *inputs: _block(*inputs, residual=False)),
    Mistake("block", "The feed-forward network reads the stream without its norm.",
            lambda *inputs: _block(*inputs, normed=False)),
    Mistake("block", "The feed-forward network reads the stream as it was before attention was added.",
            lambda *inputs: _block(*inputs, parallel=True)),
    Mistake("block", "Only queries are rotated. Rotate queries and keys.",
            lambda *inputs: _block(*inputs, rotated=(True, False))),
    Mistake("block", "The two norms are swapped.",
            lambda *inputs: _block(*inputs, swapped=True)),
    Mistake("forward", "The last norm is missing, between the last layer and the output.", _forward_without_norm),
    Mistake("attend_to_cache", "The mask is aligned with the left edge. The last query sees all S keys, "
            "so the triangle ends at the right edge.", _cached_top_left),
    Mistake("attend_to_cache", "The causal mask is missing: new tokens see the new tokens after them.",
            _cached_without_mask),
    Mistake("distribution", "The logits are multiplied by the temperature. Divide them.", _multiplied_temperature),
    Mistake("distribution", "The temperature is applied after the filters. It comes first.", _temperature_last),
    Mistake("distribution", "top_p leaves out the token that crosses the limit. It is the last one kept.",
            _nucleus_too_small),
    Mistake("distribution", "min_p is compared with each probability. It is a fraction of the best token's.",
            _min_p_absolute),
    Mistake("quantize", "There is one scale for all numbers. Each block has its own.", _one_scale),
    Mistake("quantize", "The numbers are truncated. Round them to the nearest integer.", _truncated),
    Mistake("gptq", "Each weight is rounded to the nearest integer. The weights that are left must compensate "
            "for its error.", lambda w, H: w.round()),
    Mistake("block_dot", "The products overflow: int8 holds −128 to 127. Widen the integers first.", _overflowing),
    Mistake("block_dot", "The scales of the activations are missing.",
            lambda q_w, s_w, q_x, s_x: solution.block_dot(q_w, s_w, q_x, torch.ones_like(s_x))),
    Mistake("tokens_per_second", "The cache is counted with n_heads. It holds n_kv_heads keys and values.",
            lambda args, bits, bandwidth, tokens=0: _cost(args, bits, bandwidth, tokens, heads=args.n_heads)),
    Mistake("tokens_per_second", "The embedding is counted too. One token reads a single row of it.",
            lambda args, bits, bandwidth, tokens=0:
            _cost(args, bits, bandwidth, tokens, heads=args.n_kv_heads, embedding=True)),
    Mistake("tokens_per_second", "Bits are taken for bytes. A byte has 8 bits.",
            lambda args, bits, bandwidth, tokens=0: solution.tokens_per_second(args, 8 * bits, bandwidth, tokens)),
)  # fmt: skip
