"""A solution of every exercise: Llama in plain functions, in the order of the chapters.

Nothing is shared with `model.py` but the formulas. There are no modules, no batch and no tricks: each function does in
a few lines what its chapter explains. `llama-scratch learn solution N` prints those of chapter N.

Notation: T tokens, dim numbers per token in the residual stream, head_dim numbers per head.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from llama_scratch.config import ModelArgs

# --- 0: logits → probabilities ------------------------------------------------------------------


def softmax(logits: Tensor) -> Tensor:
    """Convert scores to probabilities that sum to 1 along the last axis."""
    powers = torch.exp(logits - logits.amax(-1, keepdim=True))  # the maximum becomes e^0, so nothing overflows
    return powers / powers.sum(-1, keepdim=True)


def entropy(probabilities: Tensor) -> float:
    """Compute the expected surprisal, Σ p·log2(1/p), in bits."""
    p = probabilities[probabilities > 0]  # p·log(1/p) → 0 for p → 0
    return float(-(p * p.log2()).sum())


# --- 1: text → ids -------------------------------------------------------------------------------


def bpe(word: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Merge the bytes of a word until no pair of neighbors is a token.

    Args:
        word: The UTF-8 bytes of a piece of text.
        ranks: Token → its id. A lower id was merged earlier in training.
    """
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)  # the lowest rank first, and the leftmost of equal pairs
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


# --- 2: the embedding ----------------------------------------------------------------------------


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """Look up the row of each id: (T,) and (vocab_size, dim) → (T, dim)."""
    return table[ids]


# --- 3: RMSNorm ----------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row of x (T, dim) by its root mean square, then multiply by the weight (dim,)."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


# --- 4: attention, one head ----------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mix the values of each token and the tokens before it: (T, head_dim) each → (T, head_dim)."""
    scores = q @ k.T / math.sqrt(q.shape[-1])  # (T, T)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return softmax(scores.masked_fill(future, -math.inf)) @ v


# --- 5: RoPE -------------------------------------------------------------------------------------


def frequencies(head_dim: int, theta: float) -> Tensor:
    """Compute the angle per token of each pair, θ_j = theta^(−2j/head_dim): (head_dim/2,) radians."""
    return theta ** (-torch.arange(0, head_dim, 2) / head_dim)


def rotations(freqs: Tensor, T: int) -> Tensor:
    """Compute e^(i·m·θ_j) for the positions m = 0 … T − 1: (head_dim/2,) → (T, head_dim/2) complex."""
    angles = torch.outer(torch.arange(T).float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate each pair of neighbors in x (T, heads, head_dim) by the angle of its token and pair."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))  # (T, heads, head_dim/2)
    return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2)


# --- 6: longer contexts --------------------------------------------------------------------------


def scaled_frequencies(freqs: Tensor, factor: float, low: float, high: float, context: int) -> Tensor:
    """Divide slow frequencies by the factor, keep fast ones, and blend those in between.

    Args:
        freqs: Radians per token, (head_dim/2,).
        factor: Divisor of the slow frequencies.
        low: Pairs with fewer full turns within the context are divided.
        high: Pairs with more full turns within the context are kept.
        context: The context in tokens that the model was first trained with.
    """
    turns = context * freqs / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freqs + (1 - keep) * freqs / factor


# --- 7: many heads, few keys ---------------------------------------------------------------------


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of n_heads queries on n_kv_heads keys and values.

    q: (T, n_heads, head_dim); k, v: (T, n_kv_heads, head_dim); → (T, n_heads, head_dim).
    """
    group = q.shape[1] // k.shape[1]  # neighboring query heads share a key and a value
    heads = [attention(q[:, head], k[:, head // group], v[:, head // group]) for head in range(q.shape[1])]
    return torch.stack(heads, dim=1)


# --- 8: SwiGLU -----------------------------------------------------------------------------------


def feed_forward(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Compute w2·(SiLU(w1·x) · w3·x) for each token: (T, dim) → (T, dim).

    w1, w3: (ffn_dim, dim); w2: (dim, ffn_dim).
    """
    gate = x @ w1.T
    return (gate * torch.sigmoid(gate) * (x @ w3.T)) @ w2.T


# --- 9: the whole network ------------------------------------------------------------------------


def block(x: Tensor, w: Mapping[str, Tensor], freqs_cis: Tensor, args: ModelArgs) -> Tensor:
    """One layer: add attention to the stream, then the feed-forward network.

    Args:
        x: The residual stream, (T, dim).
        w: The layer's weights by Meta's names, such as "attention.wq.weight".
        freqs_cis: The rotations of the T positions, (T, head_dim/2).
        args: Dimensions of the network.
    """
    h = rms_norm(x, w["attention_norm.weight"], args.norm_eps)
    q, k, v = ((h @ w[f"attention.{name}.weight"].T).reshape(len(h), -1, args.head_dim) for name in ("wq", "wk", "wv"))
    mixed = grouped_attention(rotate(q, freqs_cis), rotate(k, freqs_cis), v)
    x = x + mixed.flatten(-2) @ w["attention.wo.weight"].T
    h = rms_norm(x, w["ffn_norm.weight"], args.norm_eps)
    return x + feed_forward(h, *(w[f"feed_forward.{name}.weight"] for name in ("w1", "w2", "w3")))


def forward(ids: Tensor, weights: Mapping[str, Tensor], args: ModelArgs) -> Tensor:
    """Compute the logits after each token: (T,) ids → (T, vocab_size).

    Args:
        ids: Token ids.
        weights: All weights by Meta's names, such as "layers.0.attention.wq.weight".
        args: Dimensions of the network.
    """
    freqs = frequencies(args.head_dim, args.rope_theta)
    if s := args.rope_scaling:
        freqs = scaled_frequencies(freqs, s.factor, s.low_freq_factor, s.high_freq_factor, s.original_context)
    freqs_cis = rotations(freqs, len(ids))
    x = embed(ids, weights["tok_embeddings.weight"])
    for layer in range(args.n_layers):
        x = block(x, layer_weights(weights, layer), freqs_cis, args)
    return rms_norm(x, weights["norm.weight"], args.norm_eps) @ weights["output.weight"].T


def layer_weights(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Select the weights of a layer, without the layer in their names."""
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


# --- 10: the cache -------------------------------------------------------------------------------


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the T newest of S tokens, one head: q (T, head_dim), k and v (S, head_dim) → (T, head_dim)."""
    T, S = len(q), len(k)
    scores = q @ k.T / math.sqrt(q.shape[-1])  # (T, S)
    future = torch.ones(T, S, dtype=torch.bool).triu(1 + S - T)  # row t is the token at position S − T + t
    return softmax(scores.masked_fill(future, -math.inf)) @ v


# --- 11: sampling --------------------------------------------------------------------------------


def distribution(logits: Tensor, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0) -> Tensor:
    """Compute the probabilities that a token is drawn from: (vocab_size,) → (vocab_size,).

    The temperature comes first. Each filter then sees the probabilities that the one before it has left.

    Args:
        logits: The logits.
        temperature: Divisor of the logits, above 0.
        top_k: Keep the k most probable tokens. 0 keeps all.
        top_p: Keep the smallest set of most probable tokens with this total probability.
        min_p: Keep tokens with at least this fraction of the best token's probability.
    """
    p = softmax(logits / temperature)
    if top_k:
        p = _kept(p, p >= p.topk(top_k).values[-1])
    if top_p < 1:
        ordered, order = p.sort(descending=True)
        before = torch.empty_like(p)
        before[order] = ordered.cumsum(-1) - ordered  # total probability of all better tokens
        p = _kept(p, (before < top_p) | (before == 0))
    return _kept(p, p >= min_p * p.max())


def _kept(p: Tensor, keep: Tensor) -> Tensor:
    p = p * keep
    return p / p.sum()


# --- 12, 13: heads -------------------------------------------------------------------------------


def fact_head() -> str:
    """Name the head without which ` Paris` falls the most, after `The capital of France is`."""
    return "L23.H4"


def induction_head() -> str:
    """Name the strongest induction head of SmolLM2 on repeated random tokens."""
    return "L18.H6"


# --- 14: untrusted files -------------------------------------------------------------------------


def imports_of(pickled: bytes) -> set[str]:
    """List what a pickle of protocol 2 would import, without loading it: "module.name" of each.

    torch.save writes protocol 2. Its instruction GLOBAL imports a name, and REDUCE calls it: so a pickle runs code.
    """
    return {
        str(argument).replace(" ", ".")
        for instruction, argument, _ in pickletools.genops(pickled)
        if instruction.name == "GLOBAL"
    }


# --- 15: eight and four bits ---------------------------------------------------------------------


def quantize(x: Tensor, block: int = 32) -> tuple[Tensor, Tensor]:
    """Round each block of numbers to −127 … 127, with one scale per block.

    Args:
        x: The numbers, (n,), with n a multiple of `block`.
        block: Numbers per scale.

    Returns:
        The integers (n,) as int8, and the scales (n/block,): x ≈ integer · scale.
    """
    blocks = x.reshape(-1, block)
    scales = blocks.abs().amax(-1) / 127
    steps = blocks / scales.clamp_min(1e-30)[:, None]  # a block of zeros stays zero
    return steps.round().to(torch.int8).flatten(), scales


def gptq(w: Tensor, H: Tensor) -> Tensor:
    """Round weights to integers, one by one, and let later weights compensate for each error.

    The best change of the weights that are left is −error · H[i, later] · H[later, later]⁻¹.

    Args:
        w: A row of weights, (n,).
        H: E[x xᵀ] of the inputs, (n, n).
    """
    w = w.clone()
    for i in range(len(w)):
        error = w[i].round() - w[i]
        w[i] += error
        if i + 1 < len(w):
            w[i + 1 :] -= error * torch.linalg.solve(H[i + 1 :, i + 1 :], H[i + 1 :, i])
    return w


# --- 16: the kernels -----------------------------------------------------------------------------


def block_dot(q_w: Tensor, s_w: Tensor, q_x: Tensor, s_x: Tensor) -> float:
    """Multiply two quantized vectors: integer products within a block, then both scales.

    Args:
        q_w: Integers of the weights, (n,) int8.
        s_w: Scales of the weights, (blocks,).
        q_x: Integers of the activations, (n,) int8.
        s_x: Scales of the activations, (blocks,).
    """
    products = q_w.int() * q_x.int()  # int8 would overflow
    sums = products.reshape(len(s_w), -1).sum(-1)
    return float((sums * s_w * s_x).sum())


# --- 17: the cost --------------------------------------------------------------------------------


def tokens_per_second(args: ModelArgs, bits: float, bandwidth: float, tokens: int = 0) -> float:
    """Predict the speed of decoding from the bytes that one token reads.

    It reads every weight of the linear layers once, and the keys and values of all tokens before it.

    Args:
        args: Dimensions of the network.
        bits: Bits per weight.
        bandwidth: Bytes per second that the memory delivers.
        tokens: Number of tokens in the cache, with 4 bytes per number.
    """
    weights = args.linear_parameters() * bits / 8
    cache = tokens * 2 * args.n_layers * args.n_kv_heads * args.head_dim * 4
    return bandwidth / (weights + cache)
