"""Small models with random weights in Meta's format."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_scratch.checkpoint.meta.params import parse_params
from llama_scratch.config import ModelArgs

# head_dim 64 and theta 500,000 as in Llama 3.2, so that RoPE and its scaling are the same.
TINY_PARAMS: dict[str, Any] = {
    "dim": 256,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 256 + 44 + 256,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
TINY_MERGES = """
th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri
ro ic ne ea ra ce li ch
""".split()


def tiny_args(**changes: Any) -> ModelArgs:
    """`ModelArgs` of `TINY_PARAMS` with fields replaced; None removes a field."""
    return parse_params(json.dumps(tiny_params(**changes)))


def tiny_params(**changes: Any) -> dict[str, Any]:
    """`TINY_PARAMS` with fields replaced; None removes a field."""
    return {name: value for name, value in (TINY_PARAMS | changes).items() if value is not None}


def random_weights(args: ModelArgs, *, tied: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Create random float32 weights.

    The standard deviation is 1/√fan_in, three times as large for q and k; norms are around 1.

    Args:
        args: The dimensions of the network.
        tied: Whether the output weight is the embedding.
        seed: Random seed.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in args.weight_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 1 + 0.1 * noise
        else:
            weights[name] = noise * (3 if ".wq." in name or ".wk." in name else 1) / math.sqrt(shape[1])
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return weights


def tokenizer_file() -> bytes:
    """A small tokenizer.model: the 256 bytes and 44 merges; 256 special tokens follow."""
    tokens = [bytes([byte]) for byte in range(256)] + [merge.encode() for merge in TINY_MERGES]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def write_meta(
    directory: Path,
    *,
    params: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = True,
    seed: int = 0,
) -> Path:
    """Write a complete Meta directory with random weights.

    Args:
        directory: Where to write it.
        params: Contents of params.json, by default `TINY_PARAMS`.
        dtype: Dtype of the weights.
        tied: Whether the output weight is the embedding.
        seed: Random seed.

    Returns:
        The directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    params = TINY_PARAMS if params is None else params
    args = parse_params(json.dumps(params))
    (directory / "params.json").write_text(json.dumps(params))
    (directory / "tokenizer.model").write_bytes(tokenizer_file())
    weights = {name: weight.to(dtype) for name, weight in random_weights(args, tied=False, seed=seed).items()}
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    torch.save(weights, directory / "consolidated.00.pth")
    return directory


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 2471676205\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"
