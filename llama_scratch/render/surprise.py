"""Styles of tokens by surprisal, for tables, pages and the input line.

Surprisal is shown in one hue, which gets stronger with more bits. The styles are named "surprise0" to "surprise3", and
each renderer maps them to its own colors. Terminals without 24-bit color use attributes of increasing emphasis.
"""

from __future__ import annotations

from llama_scratch.render import colors

# Upper limits of the first three styles, in bits. The last style has no limit.
LIMITS = (1.0, 4.0, 8.0)
NAMES = ("surprise0", "surprise1", "surprise2", "surprise3")
_ATTRIBUTES = ("", "underline", "bold underline", "bold reverse")


def surprise_style(bits: float | None) -> str:
    """Return the name of the style for a surprisal in bits; "" for None."""
    return "" if bits is None else NAMES[sum(bits >= limit for limit in LIMITS)]


def terminal_styles(truecolor: bool) -> dict[str, str]:
    """Return, for each name, the style as the library `rich` writes it.

    Args:
        truecolor: Whether the terminal has 24-bit color.
    """
    if not truecolor:
        return dict(zip(NAMES, _ATTRIBUTES, strict=True))
    backgrounds = colors.SURPRISE[colors.terminal_theme()]
    return {
        name: f"{colors.ink(color)} on {color}" if color else "" for name, color in zip(NAMES, backgrounds, strict=True)
    }
