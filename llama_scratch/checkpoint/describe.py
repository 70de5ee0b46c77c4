"""A description of a model as plain values."""

from __future__ import annotations

from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.checkpoint import Checkpoint, open_checkpoint
from llama_scratch.checkpoint.base import WeightStorage, reading
from llama_scratch.checkpoint.byte_level_bpe import PATTERNS
from llama_scratch.config import EMBEDDING, OUTPUT, ModelArgs
from llama_scratch.precision import PRECISIONS, kernels, resolve_device, resolve_precision, validate_precision
from llama_scratch.precision.dtypes import activation_type
from llama_scratch.precision.lazy_weight import KERNEL_FORMATS
from llama_scratch.precision.memory_estimate import memory_needed
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

# Number of cached tokens in the memory estimate, or the model's context if it is shorter.
_CONTEXT = 4096
# The fields of `ModelArgs` that define the network's dimensions.
_SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "norm_eps")
_PLAIN = {"F32", "F16", "BF16"}  # GGUF's names


def describe(
    path: Path,
    tokenizer: str | None,
    rope_factor: float | None,
    progress: Progress,
    *,
    precision: str = "auto",
    device: str = "auto",
    activations: str = "auto",
) -> dict[str, Any]:
    """Describe a model: files, dimensions, tokenizer and memory.

    Args:
        path: The model.
        tokenizer: Path of a tokenizer.model that replaces the model's own.
        rope_factor: RoPE scaling factor that replaces the model's own.
        progress: Called while files are read.
        precision: Precision to run in.
        device: Device to run on.
        activations: Dtype of the activations.

    Returns:
        A dictionary for JSON. Sizes are in bytes, and `memory` does not include the mapped files.
    """
    validate_precision(precision)
    target = resolve_device(device)
    activation_type(activations, precision, target)
    checkpoint = open_checkpoint(path, tokenizer)
    args = checkpoint.args.with_rope_factor(rope_factor)
    stored = checkpoint.storage(progress)
    files = checkpoint.files or (checkpoint.path,)
    with reading(checkpoint.path):
        sizes = [file.stat().st_size for file in files]
    return {
        "name": checkpoint.name,
        "format": checkpoint.format,
        "path": str(checkpoint.path),
        "bytes": sum(sizes),
        "files": [{"name": file.name, "bytes": size} for file, size in zip(files, sizes, strict=True)],
        "licence": checkpoint.license,
        "stored": stored.types,
        "precision": resolve_precision(precision, _dtype(checkpoint, stored), target),
        "parameters": args.n_parameters(tied=stored.tied),
        "parts": _parts(args, tied=stored.tied),
        "tied_output": stored.tied,
        "shape": {field: getattr(args, field) for field in _SHAPE},
        "rope": {
            "theta": args.rope_theta,
            "scaling": None if args.rope_scaling is None else asdict(args.rope_scaling),
            "divisors": args.rope_divisors,
            "by_option": args != checkpoint.args,
        },
        "context": args.max_seq_len,
        "chat": checkpoint.chat is not None,
        "memory": _memory(checkpoint, args, stored, target, activations),
        "kernels": kernels.state(),
        "warnings": list(checkpoint.warnings),
        "tokenizer": _tokenizer(checkpoint.tokenizer),
    }


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    bos = tokenizer.bos_id
    return {
        "kind": "byte-level BPE",
        "pattern": next((name for name, pattern in PATTERNS.items() if pattern == tokenizer.pattern), None),
        "tokens": tokenizer.n_vocab,
        "special": len(tokenizer.special_tokens),
        "bos": None if bos is None else tokenizer.token_text(bos),
        "stops": sorted(map(tokenizer.token_text, tokenizer.stop_ids)),
    }


def _parts(args: ModelArgs, *, tied: bool) -> dict[str, dict[str, float]]:
    """Count the parameters of each part. A tied output has 0."""
    counts = dict.fromkeys(("embedding", "attention", "feed_forward", "norms", "output"), 0)
    whole = {EMBEDDING: "embedding", OUTPUT: "output"}
    for name, shape in args.weight_shapes().items():
        part = whole.get(name) or ("norms" if len(shape) == 1 else name.split(".")[2])  # layers.0.attention.wq.weight
        counts[part] += 0 if tied and name == OUTPUT else prod(shape)
    total = sum(counts.values())
    return {part: {"parameters": count, "share": count / total} for part, count in counts.items()}


def _memory(
    checkpoint: Checkpoint, args: ModelArgs, stored: WeightStorage, device: torch.device, activations: str
) -> dict[str, Any]:
    """Estimate the memory that each precision needs, by purpose and in total."""
    context = min(_CONTEXT, args.max_seq_len)
    dtype = _dtype(checkpoint, stored)
    known = dtype is not None or stored.types.keys() <= KERNEL_FORMATS | _PLAIN
    needed = {
        name: memory_needed(args, name, dtype, context, device, tied=stored.tied, activations=activations, known=known)
        for name in PRECISIONS
    }
    return {
        "context": context,
        "device": device.type,
        "needed": {name: {**parts, "total": sum(parts.values())} for name, parts in needed.items()},
    }


def _dtype(checkpoint: Checkpoint, stored: WeightStorage) -> torch.dtype | None:
    """Return the dtype of the matrices, or None if some have quantized GGUF blocks."""
    blocks = checkpoint.format == "gguf" and not stored.types.keys() <= _PLAIN
    return None if blocks else stored.dtype
