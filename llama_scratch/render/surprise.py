"""How a token looks by how much it surprised: in tables, on pages, and in the line that is being typed."""

from __future__ import annotations

# Bits below which a token has a style; what surprises more has the last one.
STEPS = ((1.0, "green"), (4.0, ""), (8.0, "magenta"))
MOST_SURPRISING = "bold red"


def surprise_style(bits: float | None) -> str:
    """The style of a token by its surprisal: words for bold and the like, and names of ANSI colors."""
    if bits is None:
        return ""
    return next((style for limit, style in STEPS if bits < limit), MOST_SURPRISING)
