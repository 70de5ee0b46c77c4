"""The network's parts and what they cost."""

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
    "scores": ("attention.scores", "attention.mixing"),
    "feed-forward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "norms": ("attention_norm", "ffn_norm", "norm"),
    "output": ("output",),
}

_NAMES = {"tok_embeddings": "embedding", "attention_norm": "norm", "ffn_norm": "norm"}


def page(network: Architecture) -> Page:
    """A drawing of one layer, each part, the shares, and what a token costs."""
    args = network.args
    note = (
        "FLOPs are those of one token: two for each weight that it is multiplied with, and attention's scores and "
        f"mixing over {_tokens(network.length)}. Norms, rotation, softmax, SiLU and additions are left out: they grow "
        "with dim, the products with its square. /arch N takes a text of N tokens."
    )
    return Page(
        "Architecture",
        (
            Paragraph(_cost(network)),
            Table((f"one of {args.n_layers} layers", ">numbers a token"), tuple(_drawing(args))),
            Table(("part", "shape", ">params", ">FLOPs"), tuple(_parts(network))),
            Table(("share", ">parameters", ">FLOPs"), tuple(_shares(network))),
            Paragraph(note, "dim"),
        ),
        ("model.Transformer", "architecture"),
    )


def _cost(network: Architecture) -> str:
    tied = " (the output is the embedding again)" if network.tied else ""
    return (
        f"{network.parameters:,} parameters{tied}. A token that looks at {_tokens(network.length)} takes "
        f"{short(network.flops)} FLOPs and reads {short(network.weight_bytes)}B of weights, as they are stored now, "
        f"and {short(network.kv_bytes)}B of cached keys and values, "
        f"{short(network.kv_bytes_per_token)}B for each token."
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
        # What a narrow screen has room for.
        name = _NAMES.get(part.name, part.name.rpartition(".")[2])
        if part.name == "attention_norm":
            yield Cell(f"{part.count} layers", "dim"), Cell("each", "dim"), Cell("in all", "dim"), Cell("in all", "dim")
        if part.name in ("attention_norm", "ffn_norm"):
            group = "attention" if part.name == "attention_norm" else "ffn"
            yield Cell(f" {group}", "dim"), Cell(""), Cell(""), Cell("")
        name = ("  " if part.layered else "") + name
        shape = " × ".join(map(str, part.shape or ()))
        held = "tied" if part.name == "output" and network.tied else short(part.parameters) if part.shape else ""
        yield Cell(name), Cell(shape), Cell(held), Cell(short(part.flops) if part.flops else "")
    yield (
        Cell("together", "bold"),
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
    """A large number in three digits: 1.24G."""
    rounded = float(f"{count:.3g}")
    size, letter = next(
        ((size, letter) for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if rounded >= size),
        (1, ""),
    )
    return f"{rounded / size:.3g}{letter}"
