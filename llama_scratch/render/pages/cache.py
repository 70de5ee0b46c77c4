"""The contents of the KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Heatmap, Page, Paragraph, Table

if TYPE_CHECKING:  # they bring torch
    from llama_scratch.microscope.cache import Cache, CachedLayer
    from llama_scratch.results import Timing

_SOURCE = ("KVCache",)


def page(cache: Cache, timing: Timing | None = None) -> Page:
    """Return a page of the whole cache, with one row per layer.

    Args:
        cache: The cache.
        timing: Timing of the last answer, for its prefix cache hit.
    """
    longest = [max(norms.keys for norms in cache.layers), max(norms.values for norms in cache.layers)]
    rows = tuple(
        (
            Cell(f"L{norms.layer}"),
            *(_bar(norm, high) for norm, high in zip((norms.keys, norms.values), longest, strict=True)),
        )
        for norms in cache.layers
    )
    return Page(
        "KV cache",
        (
            Paragraph(f"{_tokens(cache.tokens)} in {len(cache.layers)} layers." + (_reused(timing) if timing else "")),
            Paragraph(
                f"Each layer holds keys and values of {cache.heads} heads × {cache.tokens:,} tokens × {cache.head_dim} "
                f"dimensions in {cache.dtype}: {_bytes(cache.bytes_per_token)} per token over all layers, "
                f"{_bytes(cache.held_bytes)} for this text. {_bytes(cache.taken_bytes)} are allocated, because the "
                "cache grows by doubling."
            ),
            Table(("", ">mean ‖K‖", ">mean ‖V‖"), rows, "Mean norms of keys and values"),
            Paragraph("/kv LAYER shows the norms per head and token.", "dim"),
        ),
        _SOURCE,
    )


def layer_page(cached: CachedLayer) -> Page:
    """Return a page of the norms of keys and values in one layer."""
    title = f"KV cache of layer {cached.layer}"
    maps = (
        _map(name, cached, norms)
        for name, norms in (("Norms of keys ‖K‖", cached.keys), ("Norms of values ‖V‖", cached.values))
    )
    note = "Rows are key/value heads, columns are tokens. RoPE does not change the norm of a key."
    if cached.queries > 1:
        note += f" Each key/value head is shared by {cached.queries} query heads."
    return Page(title, (*maps, Paragraph(note, "dim")), _SOURCE)


def _reused(timing: Timing) -> str:
    new = timing.prompt_tokens - timing.reused_tokens
    return (
        f" Prefix cache hit in the last answer: {timing.reused_tokens:,} of {_tokens(timing.prompt_tokens)}; "
        f"{new:,} {'was' if new == 1 else 'were'} computed."
    )


def _map(name: str, cached: CachedLayer, norms: tuple[tuple[float, ...], ...]) -> Heatmap:
    return Heatmap(
        f"{name} in layer {cached.layer}",
        rows=tuple(f"H{head}" for head in range(len(norms))),
        columns=tuple(token.text for token in cached.tokens),
        values=norms,
        low=min(map(min, norms)),
        high=max(map(max, norms)),
    )


def _bar(norm: float, high: float) -> Cell:
    return Cell(f"{norm:.2f}", bar=norm / high if high else 0.0)


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def _bytes(count: int) -> str:
    """Format a size in KiB or MiB."""
    if count < 1 << 20:
        return f"{count / (1 << 10):,.4g} KiB"
    return f"{count / (1 << 20):,.1f} MiB"
