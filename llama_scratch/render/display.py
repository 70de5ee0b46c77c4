"""The display of results by rich, in a notebook and as plain text.

`page_of` maps each class of result to its page.

The pages are registered here instead of in `pages` because the modules of the results import torch. A session imports
the pages before torch, and this module only when a result is displayed.
"""

from __future__ import annotations

from functools import singledispatch
from html import escape

from rich.console import RenderableType

from llama_scratch.microscope.attention import Head, Heads
from llama_scratch.microscope.attribution import Attribution
from llama_scratch.microscope.cache import Cache, CachedLayer
from llama_scratch.microscope.effect import Effect
from llama_scratch.microscope.inspection import Inspection
from llama_scratch.microscope.lens import Lens
from llama_scratch.microscope.neurons import Neurons
from llama_scratch.microscope.numerics import Numerics
from llama_scratch.microscope.patching import Trace
from llama_scratch.microscope.rope import Rope
from llama_scratch.render import text as texts
from llama_scratch.render import to_terminal
from llama_scratch.render.page import Page
from llama_scratch.render.pages import (
    attention,
    attribution,
    cache,
    effect,
    inspection,
    lens,
    neurons,
    numerics,
    patching,
    rope,
)


@singledispatch
def page_of(result: object) -> Page:
    """Build the page of a result. Raises `TypeError` if its class has none."""
    raise TypeError(f"no page is registered for {type(result).__name__}")


page_of.register(Attribution, attribution.page)
page_of.register(Cache, cache.page)
page_of.register(CachedLayer, cache.layer_page)
page_of.register(Effect, effect.page)
page_of.register(Head, attention.head)
page_of.register(Heads, attention.heads)
page_of.register(Inspection, inspection.page)
page_of.register(Lens, lens.page)
page_of.register(Neurons, neurons.page)
page_of.register(Numerics, numerics.page)
page_of.register(Rope, rope.page)
page_of.register(Trace, patching.page)


def view(result: object) -> RenderableType:
    """Render a result for a terminal."""
    return to_terminal.view(page_of(result))


def text(result: object) -> str:
    """Render a result as lines of text without colors."""
    return texts.as_text(view(result))


def frame(result: object) -> str:
    """Render a result for a notebook, in an iframe that isolates its style and script."""
    from llama_scratch.render.to_html import html  # deferred: importing jinja2 takes a while

    return (
        f'<iframe srcdoc="{escape(html(page_of(result)))}" style="width: 100%; height: 30em; border: 0" '
        "onload=\"this.style.height = this.contentDocument.documentElement.scrollHeight + 'px'\"></iframe>"
    )
