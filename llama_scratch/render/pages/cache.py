"""What the key-value cache holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Heatmap, Page, Paragraph, Table

if TYPE_CHECKING:  # they bring torch
    from llama_scratch.microscope.cache import Cache, CachedLayer
    from llama_scratch.results import Timing

_SOURCE = ("KVCache",)


def page(cache: Cache, timing: Timing | None = None) -> Page:
    """The whole cache, a row for each layer. timing: of the last answer."""
    longest = [max(norms.keys for norms in cache.layers), max(norms.values for norms in cache.layers)]
    rows = tuple(
        (
            Cell(f"L{norms.layer}"),
            *(_bar(norm, high) for norm, high in zip((norms.keys, norms.values), longest, strict=True)),
        )
        for norms in cache.layers
    )
    return Page(
        "Key-value cache",
        (
            Paragraph(f"{_tokens(cache.tokens)} in {len(cache.layers)} layers." + (_reused(timing) if timing else "")),
            Paragraph(
                f"A layer holds keys and values of {cache.heads} heads × {cache.tokens:,} tokens × {cache.head_dim} "
                f"numbers each, in {cache.dtype}: {_bytes(cache.bytes_per_token)} a token in all layers, "
                f"{_bytes(cache.held_bytes)} for this text. {_bytes(cache.taken_bytes)} are taken, because the memory "
                "grows in doubling steps."
            ),
            Table(("", ">mean ‖K‖", ">mean ‖V‖"), rows, "Mean length of a key and of a value"),
            Paragraph("/kv LAYER shows them head by head and token by token.", "dim"),
        ),
        _SOURCE,
    )


def layer_page(cached: CachedLayer) -> Page:
    """The lengths of one layer's keys and values, head by head and token by token."""
    title = f"The cache of layer {cached.layer}"
    maps = (
        _map(f"Length of the {name}", cached, norms)
        for name, norms in (("keys, ‖K‖,", cached.keys), ("values, ‖V‖,", cached.values))
    )
    note = "The key and the value of a token are as long as shown here; a rotation does not change the length of a key."
    if cached.queries > 1:
        note += f" Each row is shared by {cached.queries} query heads."
    return Page(title, (*maps, Paragraph(note, "dim")), _SOURCE)


def _reused(timing: Timing) -> str:
    new = timing.prompt_tokens - timing.reused_tokens
    return (
        f" Of the last answer's {_tokens(timing.prompt_tokens)} {timing.reused_tokens:,} came from the cache and "
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
    """As memory is counted: in KiB and MiB."""
    if count < 1 << 20:
        return f"{count / (1 << 10):,.4g} KiB"
    return f"{count / (1 << 20):,.1f} MiB"
