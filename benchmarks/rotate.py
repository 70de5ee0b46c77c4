"""Rotate a network's residual stream: different weights, same answers.

SmolLM2's file has 4-bit weights. A format with the same quantization steps would represent them exactly, so it would
look more accurate than it is. A rotation R, folded into the weights, moves them off the quantization grid:

    x → x R        weights that write to the stream rotate it: the embedding E → E R, wo and w2 → Rᵀ W
    W → W R        weights that read from the stream rotate back: wq, wk, wv, w1, w3, output

A norm divides by the root mean square, which R does not change. The weights of a norm do not commute with R, so they
are first folded into the matrices that read the norm's output.
Source: Ashkboos et al. 2024, arXiv:2401.15024 (SliceGPT), arXiv:2404.00456 (QuaRot).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.gguf import writer as write_gguf
from llama_scratch.config import EMBEDDING, OUTPUT
from llama_scratch.precision.lazy_weight import Weight, as_tensor
from llama_scratch.system.progress import silent

# Norm of a block → the matrices that read its output.
_READERS = {
    "attention_norm": ("attention.wq", "attention.wk", "attention.wv"),
    "ffn_norm": ("feed_forward.w1", "feed_forward.w3"),
}
_WRITERS = ("attention.wo", "feed_forward.w2")
_TOLERANCE = 1e-4
_PROBE = "The language reference says what a name is bound to, and where.\n" * 8


def rotated(weights: Mapping[str, Weight], layers: int, seed: int = 0) -> dict[str, Tensor]:
    """Rotate the weights in float64 and return them in float32.

    A tied output becomes a separate matrix.

    Args:
        weights: The weights of the network.
        layers: Number of layers.
        seed: Random seed of the rotation.
    """
    old = {name: as_tensor(weight).double() for name, weight in weights.items()}
    dim = old[EMBEDDING].shape[1]
    chance = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=chance, dtype=torch.float64)).Q  # R
    new = {EMBEDDING: old[EMBEDDING] @ rotation, OUTPUT: old[OUTPUT] * old["norm.weight"] @ rotation}
    norms = ["norm.weight"]
    for block in (f"layers.{i}" for i in range(layers)):
        for norm, readers in _READERS.items():
            norms.append(f"{block}.{norm}.weight")
            for name in (f"{block}.{reader}.weight" for reader in readers):
                new[name] = old[name] * old[norms[-1]] @ rotation
        for name in (f"{block}.{writer}.weight" for writer in _WRITERS):
            new[name] = rotation.T @ old[name]
    return {name: new.get(name, torch.ones(dim)).float().contiguous() for name in (*new, *norms)}


def make_rotated(source: Path, target: Path) -> None:
    """Write the rotated network as a float32 GGUF file.

    Args:
        source: The model.
        target: The file.

    Raises:
        SystemExit: If the logits differ from the source's.
    """
    checkpoint = open_checkpoint(source)
    weights = rotated(checkpoint.load(silent), checkpoint.args.n_layers)
    write_gguf.write_gguf(checkpoint, weights, target, silent)
    ids = Llama.load(source, precision="fp32").encode(_PROBE)
    expected, found = (Llama.load(path, precision="fp32").logits(ids) for path in (source, target))
    error = float((found - expected).norm() / expected.norm())
    if not error < _TOLERANCE:
        raise SystemExit(f"The rotated network's logits are off by {error:.1e}, expected less than {_TOLERANCE:.0e}.")
