"""Every view, drawn at several widths from recorded results.

    python -m tests.render.views            draws the pictures in tests/render/pictures again
    python -m tests.render.views --record   before that, computes the results in results.json again, with SmolLM2

The results are recorded, to get the same pictures on every machine. To add a view, add its result to `recorded` and its
page to `VIEWS`, and run the second command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops
from rich.console import RenderableType

from llama_scratch.llama import Llama
from llama_scratch.microscope import (
    architecture,
    attention,
    attribution,
    choices,
    compare,
    diff,
    effect,
    execution,
    interventions,
    lens,
    neurons,
    numerics,
    patching,
    rope,
    source,
    surprisal,
    tokens,
    tree,
)
from llama_scratch.microscope import cache as kv_cache
from llama_scratch.microscope.parts import NetworkPart
from llama_scratch.render import answer, to_terminal
from llama_scratch.render.page import Page
from tests.helpers.recorded import from_json, to_json
from tests.helpers.screenshots import THEMES, Line, draw, view_lines

RESULTS = Path(__file__).parent / "results.json"
PICTURES = Path(__file__).parent / "pictures"
WIDTHS = (40, 80, 100, 160)
# A picture shows its rows of screens one below the other: in color, and without.
SHEETS = {"dark": (True,), "light": (True, False)}
# Font size and distance between screens, in pixels.
_SIZE, _GAP = 11, 8

# --- Results ----------------------------------------------------------------------------------


def recorded() -> dict[str, object]:
    """Compute the results from SmolLM2 in fp32, by name."""
    llama = Llama.load("smollm2", precision="fp32", device="cpu")
    france, italy, hot = map(
        llama.encode, ("The capital of France is", "The capital of Italy is", "The opposite of hot is")
    )
    other = partial(Llama.load, "smollm2", device="cpu")
    scored = llama.encode("The cat sat on the xylophone and ate the moon.")
    scores = surprisal.surprisal(llama, scored)
    head_off = interventions.ablate(llama, NetworkPart.named("L23.H4", llama.args))
    walk = execution.walk(llama, france)
    stop = next(n for n, s in enumerate(walk.stops) if s.function == "Attention.forward" and "out" in s.in_scope)
    value = execution.look(llama, walk, stop, "q[0, -1, :, :6]")
    return {
        "answer": llama.predict(france),
        "architecture": architecture.architecture(llama, 1024),
        "cache": kv_cache.cache(llama, france),
        "cached-layer": kv_cache.cached_layer(llama, france, 23),
        "choices": choices.choices(llama, hot, [" hot", " cold", " mild", " very cold"]),
        "compare": compare.compare(llama, other(precision="int8"), france),
        "diff": diff.diff(llama, france, italy),
        "effect": effect.effect(llama, interventions.changed(llama, [head_off]), france, [head_off.label]),
        "head": attention.head(llama, france, 23, 4),
        "heads": attention.heads(llama, france),
        "layer-heads": attention.heads(llama, france, 23),
        "lens": lens.lens(llama, france),
        "neurons": neurons.neurons(llama, france, 29),
        "numerics": numerics.numerics(llama, france, lambda name, _progress: other(precision=name)),
        "patching": patching.trace(llama, france, italy),
        "rope": rope.rope(llama, france, layer=23, head=4),
        "surprisal": (scores, llama.text_of(scored), surprisal.per_character(llama, scores.tokens)),
        "tokens": tokens.tokens(llama, scored),
        "tree": (tree.tree(llama, hot), "The opposite of hot is"),
        "value": (value, walk.stops[stop]),
        "why": attribution.why(llama, france),
        "why-versus": attribution.why(llama, france, versus=llama.encode(" Rome", bos=False)[0]),
        # These pages show source code, so the pages are recorded: the pictures stay the same if the code changes.
        "source": _page("source")(source.source("RMSNorm")),
        "step": _page("execution")(walk, stop),
    }


@cache
def results() -> dict[str, Any]:
    """The recorded results by name."""
    return from_json(RESULTS.read_text(encoding="utf-8"))


# --- Views ------------------------------------------------------------------------------------


def _page(module: str, function: str = "page", **options: Any) -> Callable[..., Page]:
    """A function of a module of `render.pages`."""
    return partial(getattr(import_module(f"llama_scratch.render.pages.{module}"), function), **options)


def _of_several(page: Callable[..., Page]) -> Callable[[Any], Page]:
    """The function for a page that takes several values, which are recorded as a tuple."""
    return lambda values: page(*values)


# By the name of the view: the name of its result, and the function that makes a page or a renderable of it.
VIEWS: dict[str, tuple[str, Callable[[Any], Page | RenderableType]]] = {
    "answer": ("answer", answer.answer),
    "arch": ("architecture", _page("architecture")),
    "attention": ("heads", _page("attention", "heads")),
    "attention-layer": ("layer-heads", _page("attention", "heads")),
    "attention-head": ("head", _page("attention", "head")),
    "choices": ("choices", _page("choices")),
    "compare": ("compare", _page("compare")),
    "diff": ("diff", _page("diff")),
    "effect": ("effect", _page("effect")),
    "kv": ("cache", _page("cache")),
    "kv-layer": ("cached-layer", _page("cache", "layer_page")),
    "lens": ("lens", _page("lens")),
    "lens-ranks": ("lens", _page("lens", ranks=True)),
    "neurons": ("neurons", _page("neurons")),
    "numerics": ("numerics", _page("numerics")),
    "patch": ("patching", _page("patching")),
    "rope": ("rope", _page("rope")),
    "source": ("source", lambda page: page),
    "step": ("step", lambda page: page),
    "step-value": ("value", _of_several(_page("value_view"))),
    "surprisal": ("surprisal", _of_several(_page("surprisal"))),
    "tokens": ("tokens", _page("tokens")),
    "tree": ("tree", _of_several(_page("tree"))),
    "why": ("why", _page("attribution")),
    "why-versus": ("why-versus", _page("attribution")),
}


def lines(name: str, columns: int, theme: str = "dark", *, color: bool = True) -> Sequence[Line]:
    """The lines of a view on a terminal.

    Args:
        name: Name of the view.
        columns: Width of the terminal.
        theme: "dark" or "light".
        color: Whether the terminal has colors.
    """
    result, make = VIEWS[name]
    made = make(results()[result])
    return view_lines(to_terminal.view(made) if isinstance(made, Page) else made, columns, theme, color=color)


# --- Pictures ---------------------------------------------------------------------------------


def sheet(name: str, theme: str) -> Image.Image:
    """Draw a view at all widths, side by side on a gray background.

    Args:
        name: Name of the view.
        theme: "dark" or "light".
    """
    rows = [
        [
            draw(lines(name, columns, theme, color=color), columns, THEMES[theme], _SIZE, smooth=False)
            for columns in WIDTHS
        ]
        for color in SHEETS[theme]
    ]
    width = sum(screen.width for screen in rows[0]) + _GAP * (len(WIDTHS) + 1)
    heights = [max(screen.height for screen in row) for row in rows]
    picture = Image.new("RGB", (width, sum(heights) + _GAP * (len(rows) + 1)), "#808080")
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        left = _GAP
        for screen in row:
            picture.paste(screen, (left, top))
            left += screen.width + _GAP
        top += height + _GAP
    return picture


def path_of(name: str, theme: str) -> Path:
    """The file of a committed picture."""
    return PICTURES / f"{name}-{theme}.png"


def reduced(picture: Image.Image) -> Image.Image:
    """Reduce a picture to the 256 colors of a small file."""
    return picture.quantize(256, dither=Image.Dither.NONE)


def difference(first: Image.Image, second: Image.Image) -> Image.Image:
    """The difference of two pictures of the same size: one gray pixel for each block of 4 × 4 pixels.

    The mean of a block evens out how versions of the font library smooth the edges of letters.
    """
    blocks = [picture.convert("RGB").reduce(4) for picture in (first, second)]
    channels = ImageChops.difference(*blocks).split()
    return ImageChops.lighter(ImageChops.lighter(channels[0], channels[1]), channels[2])


def main() -> None:
    """Draw the pictures again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="views (default: all)")
    parser.add_argument("--record", action="store_true", help="compute the results again")
    arguments = parser.parse_args()
    if arguments.record:
        RESULTS.write_text(to_json(recorded()), encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    if not arguments.names:
        for file in PICTURES.glob("*.png"):
            file.unlink()
    for name in arguments.names or VIEWS:
        for theme in SHEETS:
            reduced(sheet(name, theme)).save(path_of(name, theme), optimize=True)


if __name__ == "__main__":
    main()
