"""The Llama 3 network: RMSNorm, RoPE, KV cache, attention, SwiGLU, transformer.

Attributes have the names in Meta's checkpoints (`tok_embeddings`, `layers.0.attention.wq`, …), so weights load without
renaming. This module does not depend on how the weights are stored. To read or replace activations, see `hooks`.

    x = tok_embeddings(tokens)              one vector of dim numbers per token: the residual stream
    repeated n_layers times:
        x = x + attention(norm(x))          add information from this token and earlier ones
        x = x + feed_forward(norm(x))       process each token separately
    logits = output(norm(x))                one score per token of the vocabulary; softmax turns them into probabilities

Notation
    B    batch size                       n_heads      number of query heads
    T    new tokens in this call          n_kv_heads   number of key/value heads, each shared by a group
    S    all tokens: cached and new       head_dim     size of one head, often dim / n_heads
    dim  size of the residual stream      ffn_dim      hidden size of the feed-forward layer
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_scratch.config import ModelArgs


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale it by a learned weight.

    Unlike layer norm, it does not subtract the mean or add a bias. It normalizes in float32 and casts back before
    multiplying by the weight, because the model was trained in that order.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467; `RMSNorm` in Meta's llama-models.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps  # avoids a division by zero for a vector of zeros
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        inverse_rms = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)  # (B, T, 1)
        return (x32 * inverse_rms).type_as(x) * self.weight  # (B, T, dim)


# --- Rotary embedding -------------------------------------------------------------------------
#
# Treat each query and key as head_dim/2 complex numbers c_j. At position m, c_j is rotated by the angle m·θ_j, with
# θ_j = rope_theta^(−2j/head_dim): fast for small j, slow for large j. The dot product of a query at m and a key at n
# then depends on the positions only through the distance m − n. No position embedding is added to the stream.
#
#     x0   x1   x2   x3   x4   x5   …       adjacent pairs (Hugging Face pairs the first half with the second)
#     └─c0─┘    └─c1─┘    └─c2─┘
#     ·e^(imθ0) ·e^(imθ1) ·e^(imθ2)         factors of absolute value 1 rotate without scaling


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Compute each pair's rotation angle per token, θ_j: (head_dim/2,) radians.

    Llama 3.1 extended the context from 8,192 to 131,072 tokens by slowing down the low frequencies, see `RopeScaling`.
    Always float32 on the CPU: meta tensors have no data, and bfloat16 would be off by whole turns at distant positions.
    Source: Su et al. 2021, arXiv:2104.09864; `precompute_freqs_cis` and `apply_scaling` in llama-models.
    """
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu") / args.head_dim  # 2j/head_dim
    freqs = 1.0 / (args.rope_theta**exponents)  # θ_j
    if args.rope_divisors is not None:
        return freqs / torch.tensor(args.rope_divisors, device="cpu")
    if (scaling := args.rope_scaling) is None:
        return freqs
    turns = scaling.original_context * freqs / (2 * math.pi)  # full rotations within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: high frequency, unchanged; 0: low, divided
    return (1 - keep) * freqs / scaling.factor + keep * freqs


def rotations(freqs: Tensor, positions: Tensor) -> Tensor:
    """Compute `freqs_cis`, e^{imθ_j} at positions m: (T,) → (T, head_dim/2) complex64."""
    angles = torch.outer(positions.float(), freqs)  # (T, head_dim/2)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate every pair of x by the angle for its position, in float32.

    Args:
        x: Queries or keys, (B, T, heads, head_dim).
        freqs_cis: The `rotations` of the T positions, (T, head_dim/2) complex64.
    """
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))  # (B, T, heads, head_dim/2)
    turned = pairs * freqs_cis[:, None, :]  # the same angle for every head
    return torch.view_as_real(turned).flatten(-2).type_as(x)  # (B, T, heads, head_dim)


# --- Cache ------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of all tokens so far, so that each token is processed only once.

    `length` is the number of cached tokens, which is also the position of the next one. The capacity doubles as needed,
    up to `max_seq_len`. A token takes 2 · n_kv_heads · head_dim numbers per layer: for 1B in bfloat16, 32 KiB in total.
    """

    def __init__(self, args: ModelArgs, max_seq_len: int | None = None):
        self.max_seq_len = args.max_seq_len if max_seq_len is None else max_seq_len
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * args.n_layers

    def rewind(self, length: int) -> None:
        """Truncate the cache to its first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} tokens")
        self.length = length

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Positions of the next T tokens, (T,) int64."""
        return torch.arange(self.length, self.length + T, device=device)

    def mask(self, T: int, device: torch.device) -> Tensor | None:
        """The `causal_mask` of the next T tokens, (T, S)."""
        return causal_mask(T, self.length + T, device)

    def advance(self, T: int) -> None:
        """Increase `length` by T, after every layer has stored its keys and values."""
        self.length += T

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values, (B, n_kv_heads, T, head_dim) each.

        Returns all keys and values of the layer, cached and new, (B, n_kv_heads, S, head_dim) each.
        """
        end = self.length + k.shape[2]  # S
        held = self.reserve(layer, end, k)
        for store, new in zip(held, (k, v), strict=True):
            store[:, :, self.length : end] = new
        return held[0][:, :, :end], held[1][:, :, :end]

    def reserve(self, layer: int, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's key and value buffers, (B, n_kv_heads, capacity, head_dim).

        Args:
            layer: Index of the layer.
            end: Minimum capacity in tokens.
            like: Keys, (B, n_kv_heads, T, head_dim). A new buffer has their sizes (except for T), dtype and device.
        """
        held = self._layers[layer]
        if held is None or held[0].shape[2] < end:
            held = self._layers[layer] = self._grown(held, end, like)
        return held

    @property
    def capacity(self) -> int:
        """Number of tokens that fit into the allocated memory."""
        held = self._layers[0]
        return 0 if held is None else held[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Allocated memory in bytes."""
        return sum(k.nbytes + v.nbytes for k, v in filter(None, self._layers))

    def growth(self, length: int) -> int:
        """Bytes to allocate for `length` tokens in total; 0 before the first token."""
        held = self._layers[0]
        if held is None or length <= self.capacity:
            return 0
        return 2 * len(self._layers) * (self._step(length) - self.capacity) * held[0].nbytes // self.capacity

    def _step(self, length: int) -> int:
        return min(self.max_seq_len, max(256, 1 << (length - 1).bit_length()))

    def _grown(self, held: tuple[Tensor, Tensor] | None, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if end > self.max_seq_len:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.max_seq_len}")
        B, n_kv_heads, _, head_dim = like.shape
        k, v = (like.new_empty(B, n_kv_heads, self._step(end), head_dim) for _ in range(2))
        if held is not None:
            for new, old in zip((k, v), held, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        return k, v


# --- Attention --------------------------------------------------------------------------------


def causal_mask(T: int, S: int, device: torch.device) -> Tensor | None:
    """Causal mask for the T newest of S tokens: (T, S) bool, or None for T = 1.

    Row t is the token at position S − T + t, which attends to itself and all earlier tokens.

        two new tokens after three:       k0 k1 k2 k3 k4
                                       q3  ✓  ✓  ✓  ✓  ·
                                       q4  ✓  ✓  ✓  ✓  ✓

    torch's `is_causal=True` aligns the triangle with the left edge, which is wrong with cached tokens.
    """
    if T == 1:
        return None
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute softmax(q kᵀ / √head_dim, masked) v without storing the (T, S) scores.

    Args:
        q: Queries, (B, n_heads, T, head_dim).
        k: Keys, (B, n_kv_heads, S, head_dim).
        v: Values, (B, n_kv_heads, S, head_dim).
        mask: The `causal_mask`, (T, S).
    """
    if q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    # A single new token: the query heads of a group are the T rows of one KV head, so k and v are read once per group.
    group = q.reshape(len(q), k.shape[1], -1, q.shape[-1])  # (B, n_kv_heads, n_heads/n_kv_heads, head_dim)
    return F.scaled_dot_product_attention(group, k, v, attn_mask=mask).reshape(q.shape)


def attention_probs(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Compute `attend`'s attention weights, (B, n_heads, T, S), from its arguments."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # one copy per query head of the group
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, n_heads, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.float().softmax(-1).type_as(q)


def attend_with(probs: Tensor, v: Tensor) -> Tensor:
    """Apply attention weights, (B, n_heads, T, S), to the values, as `attend` does."""
    return probs @ v.repeat_interleave(probs.shape[1] // v.shape[1], dim=1)  # (B, n_heads, T, head_dim)


class Attention(nn.Module):
    """Causal self-attention: each token reads from itself and earlier tokens.

    Each token has a query q (what it looks for), a key k (what it can be found by) and a value v (what it passes on).
    A softmax turns the dot products q·k into weights that sum to 1, and the output is the weighted sum of the values.
    Dot products grow with √head_dim. Without dividing by it, the softmax would put nearly all weight on one token.

    Grouped-query attention has n_heads query heads, but only n_kv_heads key and value heads:

        query heads   q0 q1 q2 q3 | q4 q5 q6 q7 | …      Llama 3.2 1B: 32 query heads and
                       └──┴──┴──┘    └──┴──┴──┘          8 key/value heads, so the cache is
        key/value         k0 v0         k1 v1            a quarter of the size

    Source: Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.attend = attend
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, q_dim, bias=False)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)
        self.wo = nn.Linear(q_dim, args.dim, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None, cache: KVCache, layer: int) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.wq(x).unflatten(-1, heads)  # (B, T, n_heads, head_dim)
        k = self.wk(x).unflatten(-1, heads)  # (B, T, n_kv_heads, head_dim)
        v = self.wv(x).unflatten(-1, heads)  # (B, T, n_kv_heads, head_dim)
        q = apply_rotary_emb(q, freqs_cis)
        k = apply_rotary_emb(k, freqs_cis)  # cached after rotation: positions do not change
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        k, v = cache.update(layer, k, v)  # (B, n_kv_heads, S, head_dim)
        out = self.attend(q, k, v, mask)  # (B, n_heads, T, head_dim)
        return self.wo(out.transpose(1, 2).flatten(-2))  # heads concatenated, then projected: (B, T, dim)


# --- Feed-forward, block, transformer ---------------------------------------------------------


class FeedForward(nn.Module):
    """SwiGLU feed-forward: the gate SiLU(w1 x) scales the values w3 x.

    SiLU(x) = x · sigmoid(x). Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # gate
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)  # down to the residual stream
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # values

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, T, ffn_dim) → (B, T, dim)


class TransformerBlock(nn.Module):
    """One layer: attention between tokens, then a feed-forward on each token.

    Both read a normalized copy of the residual stream and add their output to the stream.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None, cache: KVCache, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), freqs_cis, mask, cache, layer)
        return x + self.feed_forward(self.ffn_norm(x))  # (B, T, dim)


class Transformer(nn.Module):
    """The whole network: token ids in, logits over the vocabulary out.

    Source: Llama 3, arXiv:2407.21783; `Transformer` in Meta's llama-models.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        # Uninitialized: nn.Embedding's random initialization takes a second, even on the meta device.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(args.vocab_size, args.dim))
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)  # 1B and 3B: tied to tok_embeddings
        # Not a buffer: `.to(bfloat16)` would round it, and it is not in the checkpoint.
        self.freqs = rope_frequencies(args)  # (head_dim/2,)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, *, all_positions: bool = False) -> Tensor:
        """Return the logits for the next token, (B, 1, vocab_size) float32.

        Args:
            tokens: New token ids, (B, T) int64 with T ≥ 1.
            cache: Keys and values of the tokens before them. Those of the new tokens are appended.
            all_positions: Return the logits after every new token, (B, T, vocab_size).
        """
        T = tokens.shape[1]
        if cache is None:
            cache = KVCache(self.args, T)  # discarded afterwards
        freqs_cis = rotations(self.freqs.to(tokens.device), cache.positions(T, tokens.device))  # (T, head_dim/2)
        mask = cache.mask(T, tokens.device)  # (T, S)
        x = self.tok_embeddings(tokens)  # (B, T, dim)
        for layer, block in enumerate(self.layers):
            x = block(x, freqs_cis, mask, cache, layer)
        cache.advance(T)
        if not all_positions:
            x = x[:, -1:]  # the output projection is a fifth of the 1B model: skip it if possible
        return self.output(self.norm(x)).float()
