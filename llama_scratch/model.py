"""The network of Llama 3, top to bottom as in the papers: norm, rotation, cache, attention,
feed-forward, block, transformer.

Attributes carry the names of Meta's checkpoint (`tok_embeddings`, `layers.0.attention.wq`, …), so
that its weights load without a key map. How a weight is stored is not known here; where its values can
be read and replaced is `hooks`' to say.

    x = tok_embeddings(tokens)              a vector of dim numbers for each token: the residual stream
    n_layers times
        x = x + attention(norm(x))          what other tokens have to say to this one
        x = x + feed_forward(norm(x))       what this token makes of it
    logits = output(norm(x))                a score for each token of the vocabulary; their softmax is the
                                            probability that it comes next

Notation
    B    sequences of equal length        n_heads      query heads
    T    new tokens in this call          n_kv_heads   key/value heads, each shared by a group
    S    tokens in all: cached + new      head_dim     width of one head, often dim / n_heads
    dim  width of the residual stream     ffn_dim      width inside the feed-forward layer
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_scratch.config import ModelArgs


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale it by a learned weight.

    Unlike layer norm it subtracts no mean and adds no bias. The sum is taken in float32 whatever the
    type of x, and is cast back before the weight: the order that the weights were trained with.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467; `RMSNorm` in Meta's llama-models.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps  # keeps a vector of zeros from a division by zero
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        inverse_rms = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)  # (B, T, 1)
        return (x32 * inverse_rms).type_as(x) * self.weight  # (B, T, dim)


# --- Rotary embedding -------------------------------------------------------------------------
#
# A head's vector is read as head_dim/2 complex numbers c_j. The token at position m turns c_j by the
# angle m·θ_j, with θ_j = rope_theta^(−2j/head_dim): fast for small j, slow for large j. Of two positions
# only m − n is left in the product of a query at m with a key at n: attention sees distances, and no
# position is ever added to a vector.
#
#     x0   x1   x2   x3   x4   x5   …       pairs lie side by side (Hugging Face's files hold halves instead)
#     └─c0─┘    └─c1─┘    └─c2─┘
#     ·e^(imθ0) ·e^(imθ1) ·e^(imθ2)         a product with a number of length 1 turns and does not stretch


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Angle θ_j that each complex pair turns by from one token to the next: (head_dim/2,) float32 radians.

    Llama 3.1 stretched the context from 8,192 to 131,072 tokens by slowing down those pairs that did
    not make a full turn before (see `RopeScaling`). Always on the CPU and in float32: under the meta
    device it would hold no data, and in bfloat16 it would be off by whole turns at far positions.
    Source: Su et al. 2021, arXiv:2104.09864; `precompute_freqs_cis` and `apply_scaling` in llama-models.
    """
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu") / args.head_dim  # 2j/head_dim
    freqs = 1.0 / (args.rope_theta**exponents)  # θ_j
    if args.rope_divisors is not None:
        return freqs / torch.tensor(args.rope_divisors, device="cpu")
    if (scaling := args.rope_scaling) is None:
        return freqs
    turns = scaling.original_context * freqs / (2 * math.pi)  # full turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a fast pair, left alone; 0: a slow one, divided
    return (1 - keep) * freqs / scaling.factor + keep * freqs


def rotations(freqs: Tensor, positions: Tensor) -> Tensor:
    """`freqs_cis`: the unit complex numbers e^{imθ_j} of the positions m, (T,) → (T, head_dim/2) complex64."""
    angles = torch.outer(positions.float(), freqs)  # (T, head_dim/2)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn every pair of x, (B, T, heads, head_dim), by the angle of its position; computed in float32.

    freqs_cis: the `rotations` of the T positions, (T, head_dim/2) complex64.
    """
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))  # (B, T, heads, head_dim/2)
    turned = pairs * freqs_cis[:, None, :]  # the same angle for every head
    return torch.view_as_real(turned).flatten(-2).type_as(x)  # (B, T, heads, head_dim)


# --- Cache ------------------------------------------------------------------------------------


class KVCache:
    """The keys and values of all tokens seen so far, so that no token goes through the network twice.

    `length` is the number of tokens held, and with it the position of the next one. Memory grows in
    doubling steps up to `max_seq_len`; per token and layer it is 2 · n_kv_heads · head_dim numbers (1B in
    bf16: 32 KiB a token in all).
    """

    def __init__(self, args: ModelArgs, max_seq_len: int | None = None):
        self.max_seq_len = args.max_seq_len if max_seq_len is None else max_seq_len
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * args.n_layers

    def rewind(self, length: int) -> None:
        """Forget all tokens from position `length` on; what stays is untouched."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} tokens")
        self.length = length

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Where the next T tokens will stand, (T,) int64."""
        return torch.arange(self.length, self.length + T, device=device)

    def mask(self, T: int, device: torch.device) -> Tensor | None:
        """What the next T tokens may look at: see `causal_mask`."""
        return causal_mask(T, self.length + T, device)

    def advance(self, T: int) -> None:
        """Count T tokens as held, once every layer has its keys and values."""
        self.length += T

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values, (B, n_kv_heads, T, head_dim).

        Returns all of the layer's, cached and new: (B, n_kv_heads, S, head_dim).
        """
        end = self.length + k.shape[2]  # S
        held = self.reserve(layer, end, k)
        for store, new in zip(held, (k, v), strict=True):
            store[:, :, self.length : end] = new
        return held[0][:, :, :end], held[1][:, :, :end]

    def reserve(self, layer: int, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's memory, (B, n_kv_heads, capacity, head_dim), with room for `end` tokens; `like`: some keys."""
        held = self._layers[layer]
        if held is None or held[0].shape[2] < end:
            held = self._layers[layer] = self._grown(held, end, like)
        return held

    @property
    def capacity(self) -> int:
        """Tokens that fit into the memory that is taken."""
        held = self._layers[0]
        return 0 if held is None else held[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Memory that is taken."""
        return sum(k.nbytes + v.nbytes for k, v in filter(None, self._layers))

    def growth(self, length: int) -> int:
        """Bytes that `length` tokens take beyond those that are taken; before the first token unknown, 0."""
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
    """Which of S tokens each of the T newest may look at: itself and all before it, (T, S) bool.

    Row t is the token at position S − T + t. A single new token may look at everything: None.

        two new tokens behind three:       k0 k1 k2 k3 k4
                                       q3   ✓  ✓  ✓  ✓  ·
                                       q4   ✓  ✓  ✓  ✓  ✓

    `is_causal=True` would begin the triangle at the left edge: wrong once the cache holds tokens.
    """
    if T == 1:
        return None
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √head_dim, −∞ where the mask forbids) v; fused: no (T, S) scores are ever stored.

    q: (B, n_heads, T, head_dim); k, v: (B, n_kv_heads, S, head_dim); → (B, n_heads, T, head_dim).
    """
    if q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    # A single new token: the heads of a group take the place of T, so that k and v are read once for all of them.
    group = q.reshape(len(q), k.shape[1], -1, q.shape[-1])  # (B, n_kv_heads, n_heads/n_kv_heads, head_dim)
    return F.scaled_dot_product_attention(group, k, v, attn_mask=mask).reshape(q.shape)


def attention_probs(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The shares that `attend` never stores: how much each token takes of each other, (B, n_heads, T, S).

    q, k, mask: as for `attend`.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # each key head once for every head of its group
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, n_heads, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.float().softmax(-1).type_as(q)


def attend_with(probs: Tensor, v: Tensor) -> Tensor:
    """Mix the values by these shares: with `attention_probs` what `attend` computes, in two steps to look between.

    probs: (B, n_heads, T, S); v: (B, n_kv_heads, S, head_dim).
    """
    return probs @ v.repeat_interleave(probs.shape[1] // v.shape[1], dim=1)  # (B, n_heads, T, head_dim)


class Attention(nn.Module):
    """Every token asks all tokens before it, and itself, for what it needs.

    Each makes a query q (what it looks for), a key k (what it is found by) and a value v (what it hands
    over). The product q·k says how well two tokens match, a softmax turns a token's products into shares
    that add up to 1, and the values are mixed by these shares. A product of head_dim numbers of size 1 is
    of the size √head_dim: not divided by it, the softmax would give nearly all to one token.

    Grouped-query attention has n_heads queries, but only n_kv_heads keys and values:

        query heads   q0 q1 q2 q3 | q4 q5 q6 q7 | …      Llama 3.2 1B: 32 query heads
                       └──┴──┴──┘    └──┴──┴──┘          and 8 key/value heads, so that
        key/value         k0 v0         k1 v1            the cache is a quarter of the size

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
        k = apply_rotary_emb(k, freqs_cis)  # keys are cached turned: a position never changes
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        k, v = cache.update(layer, k, v)  # (B, n_kv_heads, S, head_dim)
        out = self.attend(q, k, v, mask)  # (B, n_heads, T, head_dim)
        return self.wo(out.transpose(1, 2).flatten(-2))  # heads side by side again, mixed: (B, T, dim)


# --- Feed-forward, block, transformer ---------------------------------------------------------


class FeedForward(nn.Module):
    """SwiGLU: one projection says what to write, another, through SiLU(x) = x · sigmoid(x), how much of it.

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # gate
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)  # back to the residual stream
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # values

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, T, ffn_dim) → (B, T, dim)


class TransformerBlock(nn.Module):
    """One layer: attention looks at other tokens, the feed-forward at its own.

    Each reads a normed copy of the residual stream; the stream itself is only added to.
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
    """Token ids in, a score for each token of the vocabulary out.

    Source: Llama 3, arXiv:2407.21783; `Transformer` in Meta's llama-models.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        # From an empty tensor, because nn.Embedding's random start takes a second under the meta device;
        # so the network is of no use before weights are loaded.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(args.vocab_size, args.dim))
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)  # 1B and 3B: the embedding itself
        # Not a buffer: `.to(bfloat16)` would round it, and it is not in the checkpoint.
        self.freqs = rope_frequencies(args)  # (head_dim/2,)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, *, all_positions: bool = False) -> Tensor:
        """Logits of the token after the last one, (B, 1, vocab_size) float32.

        tokens: (B, T) int64, any T ≥ 1; they stand behind what `cache` holds and are added to it.
        all_positions: the logits after every new token, (B, T, vocab_size).
        """
        T = tokens.shape[1]
        if cache is None:
            cache = KVCache(self.args, T)  # forgotten afterwards
        freqs_cis = rotations(self.freqs.to(tokens.device), cache.positions(T, tokens.device))  # (T, head_dim/2)
        mask = cache.mask(T, tokens.device)  # (T, S)
        x = self.tok_embeddings(tokens)  # (B, T, dim)
        for layer, block in enumerate(self.layers):
            x = block(x, freqs_cis, mask, cache, layer)
        cache.advance(T)
        if not all_positions:
            x = x[:, -1:]  # the output projection is a fifth of the 1B model: only where it is asked for
        return self.output(self.norm(x)).float()
