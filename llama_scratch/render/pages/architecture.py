"""The architecture of the network and its cost per token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llama_scratch.render.drawings.diagram import Diagram, Part, PartRow
from llama_scratch.render.page import Cell, Finding, Page, Paragraph, Table
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.architecture import Architecture

_GROUPS = {
    "embedding": ("tok_embeddings",),
    "projections": ("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    "q·k, probs·v": ("attention.scores", "attention.mixing"),
    "feed-forward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "norms": ("attention_norm", "ffn_norm", "norm"),
    "output": ("output",),
}

# Names of groups, as the finding writes them.
_LARGEST = {"projections": "projections of attention", "feed-forward": "feed-forward networks"}

_NAMES = {
    "tok_embeddings": "embedding",
    "attention_norm": "norm",
    "attention.scores": "q·k",
    "attention.mixing": "probs·v",
    "ffn_norm": "norm",
}


def page(network: Architecture) -> Page:
    """Return a page with a drawing of the network, its modules and the cost per token."""
    note = (
        "FLOPs are per token: two per weight of each matrix product, plus the attention scores (q·k) and the weighted "
        f"sum of values (probs·v) over {_tokens(network.length)}. Norms, rotation, softmax, SiLU and additions are not "
        "counted: they grow with dim, matrix products with its square. /arch N assumes a context of N tokens."
    )
    return Page(
        "Architecture",
        (
            Finding(finding(network)),
            _drawing(network),
            Paragraph(_cost(network)),
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


def finding(network: Architecture) -> str:
    """Say how many parameters the network has, and which group has the most."""
    shares = {group: _share(network, names) for group, names in _GROUPS.items()}
    group, share = max(shares.items(), key=lambda item: item[1])
    tied = ", which is also the output matrix" if network.tied and group == "embedding" else ""
    return (
        f"{percent(share)} of the {network.parameters:,} parameters are in the {_LARGEST.get(group, group)}{tied}. "
        f"The next token costs {short(network.flops)} FLOPs."
    )


def _share(network: Architecture, names: tuple[str, ...]) -> float:
    """The share of the parameters in the weights of the given names."""
    return sum(part.parameters for part in network.parts if part.name in names) / network.parameters


def _drawing(network: Architecture) -> Diagram:
    """Draw the residual stream with the blocks of a layer."""
    args = network.args
    queries = _heads(args.n_heads // args.n_kv_heads, "query")
    attention: tuple[PartRow, ...] = (
        (_weight(network, "RMSNorm", "attention_norm"),),
        (
            _weight(network, f"{_heads(args.n_heads, 'query')} × {args.head_dim}", "attention.wq"),
            _weight(network, f"{_heads(args.n_kv_heads, 'key')} × {args.head_dim}", "attention.wk"),
            _weight(network, f"{_heads(args.n_kv_heads, 'value')} × {args.head_dim}", "attention.wv"),
        ),
        (Part("Rotate q and k by position", f"RoPE, base {args.rope_theta:,.0f}"),),
        (Part(f"softmax(q·k / √{args.head_dim}) · v", f"{queries} per KV head"),),
        (_weight(network, "Output of the heads", "attention.wo"),),
    )
    feed_forward: tuple[PartRow, ...] = (
        (_weight(network, "RMSNorm", "ffn_norm"),),
        (
            _weight(network, "SiLU of the gate", "feed_forward.w1"),
            _weight(network, "times up-projection", "feed_forward.w3"),
        ),
        (_weight(network, "Down-projection", "feed_forward.w2"),),
    )
    return Diagram(
        "One token through the network",
        stream=f"residual stream x, {args.dim:,} wide",
        before=(_weight(network, "Embedding of the token", "tok_embeddings"),),
        layers=f"{args.n_layers} layers" if args.n_layers > 1 else "1 layer",
        branches=(attention, feed_forward),
        after=(
            _weight(network, "RMSNorm", "norm"),
            _weight(network, "Logits", "output"),
            Part("softmax", f"{args.vocab_size:,} probabilities"),
            Part("argmax", "the next token"),
        ),
    )


def _weight(network: Architecture, what: str, name: str) -> Part:
    """The part of the drawing for a weight, with its name and shape."""
    weight = next(part for part in network.parts if part.name == name)
    tied = ", tied" if network.tied and name == "output" else ""
    shape = "×".join(f"{size:,}" for size in weight.shape or ())
    return Part(what, f"{name.rpartition('.')[2]} {shape}{tied}", weight.parameters / network.parameters)


def _heads(count: int, kind: str) -> str:
    return f"{count} {kind} head{'' if count == 1 else 's'}"


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


def _shares(network: Architecture) -> Iterator[tuple[Cell, ...]]:
    for group, names in _GROUPS.items():
        flops = sum(part.flops for part in network.parts if part.name in names) / network.flops
        yield Cell(group), *(Cell(percent(share), bar=share) for share in (_share(network, names), flops))


def short(count: float) -> str:
    """Format a large number with three digits: 1.24G."""
    rounded = float(f"{count:.3g}")
    size, letter = next(
        ((size, letter) for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if rounded >= size),
        (1, ""),
    )
    return f"{rounded / size:.3g}{letter}"
