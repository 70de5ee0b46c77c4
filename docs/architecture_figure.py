"""The picture of an architecture: every part with its shapes."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from benchmarks.make_checkpoint import LLAMA_3_2_1B
from llama_scratch.checkpoint.meta.params import parse_params

# The colors of paper, text, secondary text, frames, lines and the three kinds of boxes, and of other boxes.
LIGHT = {
    "paper": "#ffffff", "text": "#0f172a", "soft": "#444444", "frame": "#94a3b8", "inside": "#fafafa",
    "edge": "#334155", "line": "#64748b", "blue": "#dbeafe", "green": "#dcfce7", "orange": "#ffedd5", "gray": "#f1f5f9",
}  # fmt: skip
DARK = {
    "paper": "#0d1117", "text": "#e6edf3", "soft": "#9da7b3", "frame": "#475569", "inside": "#131a24",
    "edge": "#94a3b8", "line": "#8b98a9", "blue": "#1c3a63", "green": "#1b4332", "orange": "#5a3312", "gray": "#2a3441",
}  # fmt: skip


def architecture(colors: dict[str, str] = LIGHT) -> Figure:
    """Draw Llama 3.2 1B: every part with its shapes.

    Args:
        colors: `LIGHT` or `DARK`.
    """
    args = parse_params(json.dumps(LLAMA_3_2_1B))
    shapes = {name: "×".join(f"{n:,}" for n in shape) for name, shape in args.weight_shapes().items()}

    def shape(name: str) -> str:
        return f"{name}  {shapes[f'layers.0.{name}.weight']}"

    figure = Figure(figsize=(12, 13.5), facecolor=colors["paper"])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12), ylim=(0, 13.5))
    axes.axis("off")
    box, arrow = partial(_box, axes, colors), partial(_arrow, axes, colors)
    axes.text(6, 13.05, "Llama 3.2 1B", ha="center", fontsize=24, weight="bold", color=colors["text"])
    subtitle = (
        f"{args.n_parameters(tied=True):,} parameters, {args.n_layers} layers, {args.max_seq_len:,} tokens of context"
    )
    axes.text(6, 12.62, subtitle, ha="center", fontsize=13, color=colors["soft"])

    blue, green, orange, gray = (colors[name] for name in ("blue", "green", "orange", "gray"))
    box(
        6,
        0.65,
        5.2,
        0.75,
        "prompt  →  tokenizer (tiktoken BPE)",
        f"token ids  (B, T), each below {args.vocab_size:,}",
        gray,
    )
    box(6, 1.95, 5.2, 0.75, "Token embedding", f"tok_embeddings  {shapes['tok_embeddings.weight']}", blue)
    axes.add_patch(
        FancyBboxPatch(
            (0.6, 2.75),
            10.8,
            6.95,
            boxstyle="round,pad=0,rounding_size=0.2",
            fc=colors["inside"],
            ec=colors["frame"],
            lw=1.5,
        )
    )
    axes.text(11.2, 9.42, f"× {args.n_layers} layers", ha="right", fontsize=14, weight="bold", color=colors["text"])
    norm = f"{shapes['layers.0.attention_norm.weight']}, eps {args.norm_eps:g}"
    box(6, 3.35, 3.6, 0.62, "RMSNorm", f"attention_norm  {norm}", orange)
    box(2.75, 4.5, 3.5, 0.72, f"{args.n_heads} query heads × {args.head_dim}", shape("attention.wq"), green)
    box(6.35, 4.5, 3.3, 0.72, f"{args.n_kv_heads} key heads × {args.head_dim}", shape("attention.wk"), green)
    box(9.75, 4.5, 3.1, 0.72, f"{args.n_kv_heads} value heads × {args.head_dim}", shape("attention.wv"), green)
    assert args.rope_scaling is not None
    factor = args.rope_scaling.factor
    rope = f"{args.head_dim // 2} complex numbers per head, base {args.rope_theta:,.0f}, scaled by {factor:g}"
    box(4.4, 5.55, 6.6, 0.62, "Rotary embedding: q and k are rotated by position", rope, green)
    cache = f"{2 * args.n_layers * args.n_kv_heads * args.head_dim * 2 // 1024} KiB per token in bf16"
    box(9.75, 5.55, 3.1, 0.62, "KV cache (all layers)", cache, gray)
    box(
        6,
        6.65,
        7.4,
        0.72,
        f"Grouped-query attention: softmax(q kᵀ / √{args.head_dim}) v",
        f"{args.n_heads // args.n_kv_heads} query heads share each key/value head;  " + shape("attention.wo"),
        green,
    )
    box(6, 7.97, 3.6, 0.62, "RMSNorm", f"ffn_norm  {norm}", orange)
    feed_forward = f"{shape('feed_forward.w1')}    {shape('feed_forward.w3')}    {shape('feed_forward.w2')}".replace(
        "feed_forward.", ""
    )
    box(6, 8.92, 7.4, 0.72, "SwiGLU feed-forward: w2( SiLU(w1 x) · w3 x )", feed_forward, green)
    box(6, 10.25, 5.2, 0.7, "RMSNorm", f"norm  {shapes['norm.weight']}", orange)
    box(6, 11.3, 5.2, 0.75, "Output projection (the embedding)", f"output  {shapes['output.weight']}", blue)
    axes.text(
        6,
        12.15,
        f"{args.vocab_size:,} logits  →  argmax: the next token",
        ha="center",
        fontsize=13,
        weight="bold",
        color=colors["text"],
    )

    for low, high in [
        (1.03, 1.57),
        (2.33, 3.04),
        (9.28, 9.9),
        (10.6, 10.92),
        (11.68, 12.02),
        (7.01, 7.66),
        (8.28, 8.56),
        (5.86, 6.29),
    ]:
        arrow((6, low), (6, high))
    for x in (2.75, 6.35, 9.75):
        arrow((6, 3.66), (x, 4.14))
        arrow((x, 4.86), (x, 5.24))
    arrow((7.7, 5.55), (8.2, 5.55))
    arrow((9.75, 5.86), (8.6, 6.29))
    # The residual stream bypasses attention and the feed-forward network.
    for low, high in [(2.88, 7.2), (7.45, 9.57)]:
        axes.plot([6, 0.85, 0.85], [low, low, high], color=colors["line"], lw=1.6, ls=(0, (4, 2)))
        arrow((0.85, high), (5.95, high), dashed=True)
        axes.text(
            6,
            high,
            "+",
            ha="center",
            va="center",
            fontsize=13,
            weight="bold",
            color=colors["text"],
            bbox={"boxstyle": "circle,pad=0.12", "fc": colors["paper"], "ec": colors["edge"]},
        )
    return figure


def _box(
    axes: Axes,
    colors: dict[str, str],
    x: float,
    y: float,
    width: float,
    height: float,
    title: str,
    detail: str,
    color: str,
) -> None:
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner, width, height, boxstyle="round,pad=0,rounding_size=0.1", fc=color, ec=colors["edge"], zorder=2
        )
    )
    axes.text(x, y + 0.13, title, ha="center", va="center", fontsize=12, weight="bold", color=colors["text"], zorder=3)
    axes.text(
        x, y - 0.16, detail, ha="center", va="center", fontsize=10, family="monospace", color=colors["text"], zorder=3
    )


def _arrow(
    axes: Axes, colors: dict[str, str], start: tuple[float, float], end: tuple[float, float], *, dashed: bool = False
) -> None:
    style: dict[str, Any] = {"arrowstyle": "-|>", "color": colors["line" if dashed else "edge"], "lw": 1.6}
    if dashed:
        style["linestyle"] = (0, (4, 2))
    axes.annotate("", xy=end, xytext=start, arrowprops=style, zorder=1)
