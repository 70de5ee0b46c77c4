"""What is in a model, as plain values."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.precision import check_name, choose, find_device
from llama_scratch.progress import Progress


def describe(
    path: Path,
    tokenizer: str | None,
    rope_factor: float | None,
    progress: Progress,
    *,
    precision: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """The facts of the model at `path`; `rope_factor` is the one asked for in place of the model's own.

    precision and device: what it would run in.
    """
    check_name(precision)
    checkpoint = open_checkpoint(path, tokenizer)
    args = checkpoint.args.with_rope_factor(rope_factor)
    stored = checkpoint.inspect(progress)
    scaling = None if args.rope_scaling is None else asdict(args.rope_scaling)
    special = checkpoint.tokenizer.special_tokens
    names = {id: text for text, id in special.items()}
    bos = checkpoint.tokenizer.bos_id
    return {
        "name": checkpoint.name,
        "format": checkpoint.format,
        "path": str(checkpoint.path),
        "bytes": checkpoint.path.stat().st_size,
        "stored": stored.types,
        "precision": choose(precision, stored.dtype, find_device(device)),
        "parameters": args.n_parameters(tied=stored.tied),
        "tied_output": stored.tied,
        "shape": {
            "dim": args.dim,
            "n_layers": args.n_layers,
            "n_heads": args.n_heads,
            "n_kv_heads": args.n_kv_heads,
            "head_dim": args.head_dim,
            "ffn_dim": args.ffn_dim,
            "vocab_size": args.vocab_size,
            "norm_eps": args.norm_eps,
        },
        "rope": {"theta": args.rope_theta, "scaling": scaling},
        "context": args.max_seq_len,
        "tokenizer": {
            "tokens": checkpoint.tokenizer.n_vocab,
            "special": len(special),
            "bos": None if bos is None else names[bos],
            "stops": sorted(names[id] for id in checkpoint.tokenizer.stop_ids),
        },
    }
