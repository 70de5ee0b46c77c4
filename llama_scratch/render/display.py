"""The page of each result that displays itself, and its forms: for rich, for a notebook, as plain text.

The pages are registered here and not in `pages`, because the results' classes bring torch: a session imports the pages
before torch, and this module only when a result is displayed.
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
    """The page of a result. Raises `TypeError` for a class without one."""
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
    """A result on a terminal."""
    return to_terminal.view(page_of(result))


def text(result: object) -> str:
    """A result as lines without colors."""
    return texts.as_text(view(result))


def frame(result: object) -> str:
    """A result in a notebook: in a frame of its own, so that the page's style and script stay its own."""
    from llama_scratch.render.to_html import html  # jinja2 takes a while to import

    return (
        f'<iframe srcdoc="{escape(html(page_of(result)))}" style="width: 100%; height: 30em; border: 0" '
        "onload=\"this.style.height = this.contentDocument.documentElement.scrollHeight + 'px'\"></iframe>"
    )
