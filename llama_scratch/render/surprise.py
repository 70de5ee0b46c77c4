"""How a token looks by how much it surprised: in tables, on pages, and in the line that is being typed."""

from __future__ import annotations

# Styles of tokens below so many bits; MOST_SURPRISING is the style above.
STYLES_BELOW = ((1.0, "green"), (4.0, ""), (8.0, "magenta"))
MOST_SURPRISING = "bold red"


def surprise_style(bits: float | None) -> str:
    """The style of a token by its surprisal: words for bold and the like, and names of ANSI colors."""
    if bits is None:
        return ""
    return next((style for limit, style in STYLES_BELOW if bits < limit), MOST_SURPRISING)
