"""The architecture of the network and its cost per token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, Paragraph, Table
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.config import ModelArgs
    from llama_scratch.microscope.architecture import Architecture, WeightRow

_GROUPS = {
    "embedding": ("tok_embeddings",),
    "projections": ("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    "q·k, probs·v": ("attention.scores", "attention.mixing"),
    "feed-forward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "norms": ("attention_norm", "ffn_norm", "norm"),
    "output": ("output",),
}

_NAMES = {
    "tok_embeddings": "embedding",
    "attention_norm": "norm",
    "attention.scores": "q·k",
    "attention.mixing": "probs·v",
    "ffn_norm": "norm",
}


def page(network: Architecture) -> Page:
    """Return a page with a drawing of one layer, all modules, and the cost of a token."""
    args = network.args
    note = (
        "FLOPs are per token: two per weight of each matrix product, plus the attention scores (q·k) and the weighted "
        f"sum of values (probs·v) over {_tokens(network.length)}. Norms, rotation, softmax, SiLU and additions are not "
        "counted: they grow with dim, matrix products with its square. /arch N assumes a context of N tokens."
    )
    return Page(
        "Architecture",
        (
            Paragraph(_cost(network)),
            Table((f"one of {args.n_layers} layers", ">per token"), tuple(_drawing(args))),
            Table(("module", "shape", ">params", ">FLOPs"), tuple(_parts(network))),
            Table(("share", ">parameters", ">FLOPs"), tuple(_shares(network))),
            Paragraph(note, "dim"),
        ),
        ("model.Transformer", "architecture"),
    )


def _cost(network: Architecture) -> str:
    tied = " (tied embeddings)" if network.tied else ""
    return (
        f"{network.parameters:,} parameters{tied}. A token that attends to {_tokens(network.length)} takes "
        f"{short(network.flops)} FLOPs and reads {short(network.weight_bytes)}B of weights, as they are stored now, "
        f"and {short(network.kv_bytes)}B of KV cache, {short(network.kv_bytes_per_token)}B per token."
    )


def _tokens(length: int) -> str:
    return "1 token" if length == 1 else f"{length:,} tokens"


def _drawing(args: ModelArgs) -> Iterator[tuple[Cell, Cell]]:
    queries, keys = f"{args.n_heads} × {args.head_dim}", f"{args.n_kv_heads} × {args.head_dim}"
    lines = (
        ("x", str(args.dim)),
        ("├─ attention_norm", ""),
        ("│  ├─ wq → rotate → q", queries),
        ("│  ├─ wk → rotate → k", keys),
        ("│  ├─ wv ─────────→ v", keys),
        ("│  ├─ softmax(q·k) · v", queries),
        ("│  └─ wo", ""),
        ("+ x", str(args.dim)),
        ("├─ ffn_norm", ""),
        ("│  ├─ w1 → SiLU", str(args.ffn_dim)),
        ("│  ├─ × w3", str(args.ffn_dim)),
        ("│  └─ w2", ""),
        ("+ x", str(args.dim)),
    )
    for drawn, numbers in lines:
        yield Cell(drawn), Cell(numbers)


def _parts(network: Architecture) -> Iterator[tuple[Cell, ...]]:
    for part in network.parts:
        # Short names, for narrow screens.
        name = _NAMES.get(part.name, part.name.rpartition(".")[2])
        if part.name == "attention_norm":
            yield Cell(f"{part.count} layers", "dim"), Cell("each", "dim"), Cell("total", "dim"), Cell("total", "dim")
        if part.name in ("attention_norm", "ffn_norm"):
            group = "attention" if part.name == "attention_norm" else "ffn"
            yield Cell(f" {group}", "dim"), Cell(""), Cell(""), Cell("")
        name = ("  " if part.layered else "") + name
        shape = " × ".join(map(str, part.shape or ()))
        held = "tied" if part.name == "output" and network.tied else short(part.parameters) if part.shape else ""
        yield Cell(name), Cell(shape), Cell(held), Cell(short(part.flops) if part.flops else "")
    yield (
        Cell("total", "bold"),
        Cell(""),
        Cell(short(network.parameters), "bold"),
        Cell(short(network.flops), "bold"),
    )


def _shares(network: Architecture) -> Iterator[tuple[Cell, Cell, Cell]]:
    for group, names in _GROUPS.items():
        parts: list[WeightRow] = [part for part in network.parts if part.name in names]
        shares = (
            sum(part.parameters for part in parts) / network.parameters,
            sum(part.flops for part in parts) / network.flops,
        )
        parameters, flops = (Cell(percent(share), bar=share) for share in shares)
        yield Cell(group), parameters, flops


def short(count: float) -> str:
    """Format a large number with three digits: 1.24G."""
    rounded = float(f"{count:.3g}")
    size, letter = next(
        ((size, letter) for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if rounded >= size),
        (1, ""),
    )
    return f"{rounded / size:.3g}{letter}"
