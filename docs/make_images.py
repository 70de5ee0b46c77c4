"""Create the pictures of README.md and docs/.

    make images        (python -m docs.make_images [NAME …])

Most pictures are screens of real sessions: the program runs with SmolLM2 on a pseudo-terminal, and each cell of the
terminal is drawn. The numbers in the picture of the architecture come from the `ModelArgs` of Llama 3.2 1B.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image, ImageDraw, ImageFont
from pyte.screens import Char, Screen

from benchmarks.make_checkpoint import LLAMA_3_2_1B
from llama_scratch.checkpoint.meta.params import parse_params
from llama_scratch.llama import Llama
from llama_scratch.microscope import attention
from llama_scratch.microscope import patching as tracing
from llama_scratch.render.pages import attention as attention_pages
from llama_scratch.render.pages import patching
from llama_scratch.render.to_png import png
from tests.helpers.terminal import Terminal

FOLDER = Path(__file__).parent.parent / "OutputImages"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"

# --- Screens of sessions ----------------------------------------------------------------------

BACKGROUND, FOREGROUND = "#1e1e2e", "#cdd6f4"
# pyte's names of the sixteen colors that a terminal theme sets.
PALETTE = {
    "black": "#45475a",
    "red": "#f38ba8",
    "green": "#a6e3a1",
    "brown": "#f9e2af",
    "blue": "#89b4fa",
    "magenta": "#f5c2e7",
    "cyan": "#94e2d5",
    "white": "#bac2de",
    "brightblack": "#7f849c",
    "default": FOREGROUND,
}
SIZE = 22


def session() -> Image.Image:
    """A prompt and its answer, one accepted token, and another prompt."""
    with _start() as terminal:
        for keys in (["The capital of France is", "enter"], ["enter"], ["The opposite of hot is", "enter"]):
            _answered(terminal, *keys)
        return draw(terminal.screen)


def before_enter() -> Image.Image:
    """Live prediction: a prompt before Enter is pressed."""
    with _start(rows=12) as terminal:
        terminal.type("The capital of France is")
        terminal.wait_for("· entropy")
        terminal.settle(1)
        return draw(terminal.screen)


def after_enter() -> Image.Image:
    """The answer to the same prompt."""
    with _start(rows=16) as terminal:
        _answered(terminal, "The capital of France is", "enter")
        return draw(terminal.screen)


def tree() -> Image.Image:
    """The most probable continuations, as a tree."""
    return _view("The opposite of hot is", "/tree 3x2", "moves back", rows=44)


def surprisal() -> Image.Image:
    """The surprisal of each token of a sentence."""
    with _start(rows=40) as terminal:
        terminal.type("/surprisal The cat sat on the xylophone and ate the moon.", "enter")
        terminal.wait_for("perplexity")
        terminal.settle(1)
        return draw(terminal.screen)


def chat() -> Image.Image:
    """A conversation."""
    with _start("--chat", rows=34) as terminal:
        for line in ("What is the capital of France?", "And what is it famous for?"):
            terminal.type(line, "enter")
            terminal.settle(6)
        return draw(terminal.screen)


def why() -> Image.Image:
    """Attribution of a prediction on one screen."""
    return _view("The capital of France is", "/why Paris vs Rome", "/source attribution", rows=56)


def lens() -> Image.Image:
    """The logit lens."""
    return _view("The capital of France is", "/lens", "/source guesses", rows=60)


def trace() -> Image.Image:
    """Causal tracing of a fact, as /picture draws it."""
    llama = Llama.load("smollm2", precision="fp32")
    ids, other = (llama.encode(f"The capital of {country} is") for country in ("France", "Italy"))
    return Image.open(io.BytesIO(png(patching.page(tracing.trace(llama, ids, other)))))


def induction() -> Image.Image:
    """The induction head of the chapter 13-induction.md on a text that repeats."""
    llama = Llama.load("smollm2", precision="fp32")
    ids = llama.encode("The cat sat on the mat. The dog lay on the rug. The cat sat on the mat. The dog lay on the")
    return Image.open(io.BytesIO(png(attention_pages.head(attention.head(llama, ids, 18, 6)))))


def _start(*options: str, rows: int = 48) -> Terminal:
    terminal = Terminal("--model", "smollm2", *options, columns=84, rows=rows)
    terminal.wait_for("lists the commands")  # in the banner, which is above the first prompt
    terminal.settle(3)  # until its background jobs have finished
    return terminal


def _view(prompt: str, command: str, end: str, rows: int) -> Image.Image:
    """A prompt, its answer, and the output of a command that ends with `end`."""
    with _start(rows=rows) as terminal:
        _answered(terminal, prompt, "enter")
        terminal.type(command, "enter")
        terminal.wait_for(end)
        terminal.settle(1)
        return draw(terminal.screen)


def _answered(terminal: Terminal, *keys: str) -> None:
    answers = terminal.seen("entropy")
    terminal.type(*keys)
    terminal.wait_for_more("entropy", answers)
    terminal.settle()


def draw(screen: Screen) -> Image.Image:
    """Draw a terminal's screen as a picture, down to the last line with text."""
    regular, bold = (ImageFont.truetype(FONTS / f"DejaVuSansMono{kind}.ttf", SIZE) for kind in ("", "-Bold"))
    width, height = round(regular.getlength("M")), round(SIZE * 1.4)
    rows = 1 + max(row for row in range(screen.lines) if screen.display[row].strip() or row == screen.cursor.y)
    margin = SIZE
    image = Image.new("RGB", (screen.columns * width + 2 * margin, rows * height + 2 * margin), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    for row in range(rows):
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            foreground, background = _colors(cell)
            x, y = margin + column * width, margin + row * height
            if (column, row) == (screen.cursor.x, screen.cursor.y):
                foreground, background = BACKGROUND, FOREGROUND
            if background != BACKGROUND:
                canvas.rectangle((x, y, x + width - 1, y + height - 1), fill=background)
            if (eighths := " ▏▎▍▌▋▊▉█".find(cell.data)) > 0:  # drawn as rectangles to avoid seams
                canvas.rectangle((x, y + 6, x + round(width * eighths / 8) - 1, y + height - 7), fill=foreground)
            elif cell.data.strip():
                canvas.text((x, y + height * 0.12), cell.data, fill=foreground, font=bold if cell.bold else regular)
    return image


def _colors(cell: Char) -> tuple[str, str]:
    foreground, background = _color(cell.fg, FOREGROUND), _color(cell.bg, BACKGROUND)
    return (background, foreground) if cell.reverse else (foreground, background)


def _color(name: str, default: str) -> str:
    if name == "default":
        return default
    return PALETTE.get(name, f"#{name}")


# --- The architecture -------------------------------------------------------------------------


def architecture() -> Figure:
    """Llama 3.2 1B: every part with its shapes."""
    args = parse_params(json.dumps(LLAMA_3_2_1B))
    shapes = {name: "×".join(f"{n:,}" for n in shape) for name, shape in args.weight_shapes().items()}

    def shape(name: str) -> str:
        return f"{name}  {shapes[f'layers.0.{name}.weight']}"

    figure = Figure(figsize=(12, 13.5), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12), ylim=(0, 13.5))
    axes.axis("off")
    axes.text(6, 13.05, "Llama 3.2 1B", ha="center", fontsize=24, weight="bold")
    subtitle = (
        f"{args.n_parameters(tied=True):,} parameters, {args.n_layers} layers, {args.max_seq_len:,} tokens of context"
    )
    axes.text(6, 12.62, subtitle, ha="center", fontsize=13, color="#444444")

    blue, green, orange, gray = "#dbeafe", "#dcfce7", "#ffedd5", "#f1f5f9"
    _box(
        axes,
        6,
        0.65,
        5.2,
        0.75,
        "prompt  →  tokenizer (tiktoken BPE)",
        f"token ids  (B, T), each below {args.vocab_size:,}",
        gray,
    )
    _box(axes, 6, 1.95, 5.2, 0.75, "Token embedding", f"tok_embeddings  {shapes['tok_embeddings.weight']}", blue)
    axes.add_patch(
        FancyBboxPatch(
            (0.6, 2.75), 10.8, 6.95, boxstyle="round,pad=0,rounding_size=0.2", fc="#fafafa", ec="#94a3b8", lw=1.5
        )
    )
    axes.text(11.2, 9.42, f"× {args.n_layers} layers", ha="right", fontsize=14, weight="bold", color="#334155")
    norm = f"{shapes['layers.0.attention_norm.weight']}, eps {args.norm_eps:g}"
    _box(axes, 6, 3.35, 3.6, 0.62, "RMSNorm", f"attention_norm  {norm}", orange)
    _box(axes, 2.75, 4.5, 3.5, 0.72, f"{args.n_heads} query heads × {args.head_dim}", shape("attention.wq"), green)
    _box(axes, 6.35, 4.5, 3.3, 0.72, f"{args.n_kv_heads} key heads × {args.head_dim}", shape("attention.wk"), green)
    _box(axes, 9.75, 4.5, 3.1, 0.72, f"{args.n_kv_heads} value heads × {args.head_dim}", shape("attention.wv"), green)
    assert args.rope_scaling is not None
    factor = args.rope_scaling.factor
    rope = f"{args.head_dim // 2} complex numbers per head, base {args.rope_theta:,.0f}, scaled by {factor:g}"
    _box(axes, 4.4, 5.55, 6.6, 0.62, "Rotary embedding: q and k are rotated by position", rope, green)
    cache = f"{2 * args.n_layers * args.n_kv_heads * args.head_dim * 2 // 1024} KiB per token in bf16"
    _box(axes, 9.75, 5.55, 3.1, 0.62, "KV cache (all layers)", cache, gray)
    _box(
        axes,
        6,
        6.65,
        7.4,
        0.72,
        f"Grouped-query attention: softmax(q kᵀ / √{args.head_dim}) v",
        f"{args.n_heads // args.n_kv_heads} query heads share each key/value head;  " + shape("attention.wo"),
        green,
    )
    _box(axes, 6, 7.97, 3.6, 0.62, "RMSNorm", f"ffn_norm  {norm}", orange)
    feed_forward = f"{shape('feed_forward.w1')}    {shape('feed_forward.w3')}    {shape('feed_forward.w2')}".replace(
        "feed_forward.", ""
    )
    _box(axes, 6, 8.92, 7.4, 0.72, "SwiGLU feed-forward: w2( SiLU(w1 x) · w3 x )", feed_forward, green)
    _box(axes, 6, 10.25, 5.2, 0.7, "RMSNorm", f"norm  {shapes['norm.weight']}", orange)
    _box(axes, 6, 11.3, 5.2, 0.75, "Output projection (the embedding)", f"output  {shapes['output.weight']}", blue)
    axes.text(
        6, 12.15, f"{args.vocab_size:,} logits  →  argmax: the next token", ha="center", fontsize=13, weight="bold"
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
        _arrow(axes, (6, low), (6, high))
    for x in (2.75, 6.35, 9.75):
        _arrow(axes, (6, 3.66), (x, 4.14))
        _arrow(axes, (x, 4.86), (x, 5.24))
    _arrow(axes, (7.7, 5.55), (8.2, 5.55))
    _arrow(axes, (9.75, 5.86), (8.6, 6.29))
    # The residual stream bypasses attention and the feed-forward network.
    for low, high in [(2.88, 7.2), (7.45, 9.57)]:
        axes.plot([6, 0.85, 0.85], [low, low, high], color="#64748b", lw=1.6, ls=(0, (4, 2)))
        _arrow(axes, (0.85, high), (5.95, high), dashed=True)
        axes.text(
            6,
            high,
            "+",
            ha="center",
            va="center",
            fontsize=13,
            weight="bold",
            bbox={"boxstyle": "circle,pad=0.12", "fc": "white", "ec": "#334155"},
        )
    return figure


def _box(axes: Axes, x: float, y: float, width: float, height: float, title: str, detail: str, color: str) -> None:
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner, width, height, boxstyle="round,pad=0,rounding_size=0.1", fc=color, ec="#334155", zorder=2
        )
    )
    axes.text(x, y + 0.13, title, ha="center", va="center", fontsize=12, weight="bold", zorder=3)
    axes.text(x, y - 0.16, detail, ha="center", va="center", fontsize=10, family="monospace", zorder=3)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], *, dashed: bool = False) -> None:
    style: dict[str, Any] = {"arrowstyle": "-|>", "color": "#64748b" if dashed else "#334155", "lw": 1.6}
    if dashed:
        style["linestyle"] = (0, (4, 2))
    axes.annotate("", xy=end, xytext=start, arrowprops=style, zorder=1)


PICTURES: dict[str, Callable[[], Image.Image | Figure]] = {
    "llamaFromScratchReadMePicture": session,
    "llama321BPicture": architecture,
    "prompt1": before_enter,
    "prompt1Output": after_enter,
    "tree": tree,
    "surprisal": surprisal,
    "chat": chat,
    "why": why,
    "lens": lens,
    "trace": trace,
    "induction": induction,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"pictures (default: all): {', '.join(PICTURES)}")
    for name in parser.parse_args().names or PICTURES:
        picture = PICTURES[name]()
        path = FOLDER / f"{name}.png"
        if isinstance(picture, Figure):
            picture.savefig(path, dpi=110)
        else:
            picture.save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
