"""Styles of tokens by surprisal, for tables, pages and the input line."""

from __future__ import annotations

# The style for each upper limit in bits. MOST_SURPRISING is the style above the last limit.
STYLES_BELOW = ((1.0, "green"), (4.0, ""), (8.0, "magenta"))
MOST_SURPRISING = "bold red"


def surprise_style(bits: float | None) -> str:
    """The style of a token with a surprisal of `bits`: ANSI color and attributes."""
    if bits is None:
        return ""
    return next((style for limit, style in STYLES_BELOW if bits < limit), MOST_SURPRISING)
