"""Llama's forward pass a second time, from the formulas: the witness that the package is compared with.

It imports nothing of the package, and every step is done another way: real numbers instead of complex
ones, keys and values repeated head by head, the softmax written out, no cache, all in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = Mapping[str, Any]
"""n_layers, n_heads, n_kv_heads, norm_eps, rope_theta and rope_factor, which is None where nothing is scaled."""


@dataclass(frozen=True)
class Past:
    """What stands before the first token: for each layer turned keys and values, (tokens, n_kv_heads, head_dim)."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]


@dataclass(frozen=True)
class Run:
    """Logits (T, vocab_size), and the residual stream behind each layer, (T, dim) each."""

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
    """Run `ids` through the network whose weights stand under the names of Meta's checkpoints."""

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
    """Each query's mix of values: q is (T, n_heads, head_dim), k and v (S, n_kv_heads, head_dim); (T, dim)."""
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
    """x, (T, heads, head_dim), with the numbers 2j and 2j + 1 of each head turned by angles[:, j]."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    result = torch.empty_like(x)
    result[..., 0::2] = even * cos - odd * sin
    result[..., 1::2] = even * sin + odd * cos
    return result


def rope_angles(positions: Sequence[int], head_dim: int, theta: float, factor: float | None) -> Tensor:
    """The angle of each pair at each position, (positions, head_dim/2) float64 radians."""
    frequencies = [rope_frequency(pair, head_dim, theta, factor) for pair in range(head_dim // 2)]
    return torch.outer(torch.tensor(positions, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64))


def rope_frequency(pair: int, head_dim: int, theta: float, factor: float | None) -> float:
    """Radians that one pair turns by from token to token, with Llama 3.1's scaling by wavelength."""
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
    """The same network as Hugging Face's `LlamaForCausalLM`, with eager attention.

    Its q and k hold the two numbers of a pair half a head apart, so that their rows are sorted anew.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
    if shape["rope_factor"] is not None:
        rope |= {"rope_type": "llama3", "factor": shape["rope_factor"], "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    vocab_size, dim = weights["tok_embeddings.weight"].shape
    make_config: Any = LlamaConfig  # its type does not know every setting that it takes
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
    # Made under the meta device, the rotary embedding holds no data.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def in_halves(x: Tensor, axis: int) -> Tensor:
    """One head's numbers in Hugging Face's order: the first of every pair, then the second of every pair."""
    n = x.shape[axis]
    return x.index_select(axis, torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2)]))
