"""Reference implementation of Llama's forward pass, written from the formulas.

Independent of the package, with every step computed differently: real instead of complex numbers, keys and values
selected per head, an explicit softmax, no cache, and float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = Mapping[str, Any]
"""n_layers, n_heads, n_kv_heads, norm_eps, rope_theta and rope_factor, which is None if RoPE is not scaled."""


@dataclass(frozen=True)
class Past:
    """Rotated keys and values of earlier tokens for each layer.

    Each tensor is (tokens, n_kv_heads, head_dim).
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]


@dataclass(frozen=True)
class Run:
    """Logits (T, vocab_size), and the residual stream after each layer, (T, dim) each."""

    logits: Tensor
    residuals: list[Tensor]


def forward(
    weights: Mapping[str, Tensor],
    shape: Shape,
    ids: Sequence[int],
    *,
    past: Past | None = None,
    dtype: torch.dtype = torch.float64,
) -> Run:
    """Run the network on token ids.

    Args:
        weights: Weights by the names of Meta's checkpoints.
        shape: The dimensions of the network.
        ids: Token ids.
        past: Keys and values of earlier tokens.
        dtype: Dtype of the computation.
    """

    def weight(name: str) -> Tensor:
        return weights[f"{name}.weight"].to(dtype)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape["norm_eps"]) * weight(name)

    start = 0 if past is None else past.keys[0].shape[0]
    head_dim = weights["layers.0.attention.wq.weight"].shape[0] // shape["n_heads"]
    angles = rope_angles(range(start, start + len(ids)), head_dim, shape["rope_theta"], shape["rope_factor"])
    x = weight("tok_embeddings")[torch.tensor(ids)]
    residuals = []
    for i in range(shape["n_layers"]):
        normed = norm(x, f"layers.{i}.attention_norm")
        projected = (normed @ weight(f"layers.{i}.attention.{name}").T for name in ("wq", "wk", "wv"))
        q, k, v = (y.reshape(len(ids), -1, head_dim) for y in projected)
        q, k = turned(q, angles.to(dtype)), turned(k, angles.to(dtype))
        if past is not None:
            k, v = torch.cat([past.keys[i].to(dtype), k]), torch.cat([past.values[i].to(dtype), v])
        x = x + attention(q, k, v, start) @ weight(f"layers.{i}.attention.wo").T
        normed = norm(x, f"layers.{i}.ffn_norm")
        gate = normed @ weight(f"layers.{i}.feed_forward.w1").T
        inner = gate / (1 + torch.exp(-gate)) * (normed @ weight(f"layers.{i}.feed_forward.w3").T)
        x = x + inner @ weight(f"layers.{i}.feed_forward.w2").T
        residuals.append(x)
    return Run(norm(x, "norm") @ weight("output").T, residuals)


def attention(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Causal attention with grouped queries.

    Args:
        q: Queries, (T, n_heads, head_dim).
        k: Keys, (S, n_kv_heads, head_dim).
        v: Values, (S, n_kv_heads, head_dim).
        start: Position of the first query.

    Returns:
        The weighted sums of values, (T, dim).
    """
    heads = []
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]  # neighboring query heads share one key head
        scores = q[:, head] @ k[:, shared].T / math.sqrt(q.shape[2])  # (T, S)
        positions = torch.arange(start, start + len(q))
        scores[torch.arange(len(k)) > positions[:, None]] = -math.inf  # the future
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        heads.append(weights / weights.sum(-1, keepdim=True) @ v[:, shared])
    return torch.cat(heads, dim=-1)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate elements 2j and 2j + 1 of each head of x by angles[:, j].

    x is (T, heads, head_dim), angles (T, head_dim/2).
    """
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    result = torch.empty_like(x)
    result[..., 0::2] = even * cos - odd * sin
    result[..., 1::2] = even * sin + odd * cos
    return result


def rope_angles(positions: Sequence[int], head_dim: int, theta: float, factor: float | None) -> Tensor:
    """Rotation angles in radians, float64 (positions, head_dim/2).

    Args:
        positions: Token positions.
        head_dim: Elements per head.
        theta: Base of the frequencies.
        factor: Llama 3.1's scaling factor, or None.
    """
    frequencies = [rope_frequency(pair, head_dim, theta, factor) for pair in range(head_dim // 2)]
    return torch.outer(torch.tensor(positions, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64))


def rope_frequency(pair: int, head_dim: int, theta: float, factor: float | None) -> float:
    """Rotation of one pair per token in radians, with Llama 3.1's scaling.

    Args:
        pair: Index of the pair.
        head_dim: Elements per head.
        theta: Base of the frequencies.
        factor: The scaling factor, or None.
    """
    frequency = math.pow(theta, -2 * pair / head_dim)
    if factor is None:
        return frequency
    original, low, high = 8192, 1, 4
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def transformers_llama(weights: Mapping[str, Tensor], shape: Shape) -> Any:
    """Build the network as Hugging Face's `LlamaForCausalLM` (eager attention).

    Hugging Face stores the two elements of a rotated pair half a head apart, so the rows of q and k are reordered.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
    if shape["rope_factor"] is not None:
        rope |= {"rope_type": "llama3", "factor": shape["rope_factor"], "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    vocab_size, dim = weights["tok_embeddings.weight"].shape
    make_config: Any = LlamaConfig  # its type annotations lack some settings
    config = make_config(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=weights["layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        rms_norm_eps=shape["norm_eps"],
        max_position_embeddings=131_072,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    for i in range(shape["n_layers"]):
        for ours, theirs in names.items():
            weight = weights[f"layers.{i}.{ours}.weight"]
            if ours in ("attention.wq", "attention.wk"):
                weight = in_halves(weight.reshape(-1, dim // shape["n_heads"], dim), 1).reshape(-1, dim)
            state[f"model.layers.{i}.{theirs}.weight"] = weight
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    # The rotary embedding was created on the meta device and has no data.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def in_halves(x: Tensor, axis: int) -> Tensor:
    """Reorder the elements of a head as Hugging Face does.

    The first elements of all pairs come first, then the second elements.
    """
    n = x.shape[axis]
    return x.index_select(axis, torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2)]))
