"""The contents of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_scratch.render.page import Finding, Heatmap, Page, Paragraph, written
from llama_scratch.render.scale import Scale

if TYPE_CHECKING:  # they import torch
    from llama_scratch.microscope.cache import Cache, CachedLayer
    from llama_scratch.results import Timing, Token

_SOURCE = ("KVCache",)


def page(cache: Cache, timing: Timing | None = None) -> Page:
    """Return a page of the whole cache, with heat maps of norms by layer and position.

    Args:
        cache: The cache.
        timing: Timing of the last answer, for its prefix cache hit.
    """
    rows = tuple(f"L{norms.layer}" for norms in cache.layers)
    keys, values = (
        _map(f"Norms of {name}, mean over heads", rows, cache.text, norms)
        for name, norms in (
            ("keys ‖K‖", tuple(norms.each_key for norms in cache.layers)),
            ("values ‖V‖", tuple(norms.each_value for norms in cache.layers)),
        )
    )
    return Page(
        "KV cache",
        (
            Finding(finding(cache)),
            Paragraph(f"{_tokens(cache.tokens)} in {len(cache.layers)} layers." + (_reused(timing) if timing else "")),
            keys,
            values,
            Paragraph(
                f"Each layer holds keys and values of {cache.heads} heads × {cache.tokens:,} tokens × {cache.head_dim} "
                f"dimensions in {cache.dtype}: {_bytes(cache.bytes_per_token)} per token over all layers, "
                f"{_bytes(cache.held_bytes)} for this text. {_bytes(cache.taken_bytes)} are allocated, because the "
                "cache grows by doubling.",
                "dim",
            ),
            Paragraph("/kv LAYER shows the norms per head and token.", "dim"),
        ),
        _SOURCE,
    )


def finding(cache: Cache) -> str:
    """State the size of the cache, and where keys and values have the largest norms."""
    where = " and the ".join(
        f"longest {name} are at {written(cache.text[position].text, token=True)} (position {position}) "
        f"in L{layer}, mean norm {norm:.1f}"
        for name, (norm, layer, position) in (
            ("keys", _longest([norms.each_key for norms in cache.layers])),
            ("values", _longest([norms.each_value for norms in cache.layers])),
        )
    )
    return f"{_bytes(cache.held_bytes)} for {_tokens(cache.tokens)}. The {where}."


def _longest(rows: Sequence[Sequence[float]]) -> tuple[float, int, int]:
    """The largest value of a grid, its row and its column."""
    return max((value, r, c) for r, row in enumerate(rows) for c, value in enumerate(row))


def layer_page(cached: CachedLayer) -> Page:
    """Return a page of the norms of keys and values in one layer."""
    title = f"KV cache of layer {cached.layer}"
    rows = tuple(f"H{head}" for head in range(len(cached.keys)))
    maps = (
        _map(f"{name} in layer {cached.layer}", rows, cached.tokens, norms)
        for name, norms in (("Norms of keys ‖K‖", cached.keys), ("Norms of values ‖V‖", cached.values))
    )
    note = "Rows are key/value heads, columns are tokens. RoPE does not change the norm of a key."
    if cached.queries > 1:
        note += f" Each key/value head is shared by {cached.queries} query heads."
    return Page(title, (Finding(layer_finding(cached)), *maps, Paragraph(note, "dim")), _SOURCE)


def layer_finding(cached: CachedLayer) -> str:
    """State the heads and tokens of the keys and values with the largest norms."""
    places = (
        f"the longest {name} is that of {written(cached.tokens[position].text, token=True)} (position {position}) "
        f"in H{head}, norm {norm:.1f}"
        for name, (norm, head, position) in (("key", _longest(cached.keys)), ("value", _longest(cached.values)))
    )
    return f"In layer {cached.layer}, {' and '.join(places)}."


def _reused(timing: Timing) -> str:
    new = timing.prompt_tokens - timing.reused_tokens
    return (
        f" Prefix cache hit in the last answer: {timing.reused_tokens:,} of {_tokens(timing.prompt_tokens)}; "
        f"{new:,} {'was' if new == 1 else 'were'} computed."
    )


def _map(title: str, rows: tuple[str, ...], tokens: Sequence[Token], norms: tuple[tuple[float, ...], ...]) -> Heatmap:
    return Heatmap(
        title,
        rows=rows,
        columns=tuple(token.text for token in tokens),
        values=norms,
        scale=Scale(min(map(min, norms)), max(map(max, norms))),
    )


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def _bytes(count: int) -> str:
    """Format a size in KiB or MiB."""
    if count < 1 << 20:
        return f"{count / (1 << 10):,.4g} KiB"
    return f"{count / (1 << 20):,.1f} MiB"
