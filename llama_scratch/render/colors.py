"""Color scales on web pages, in pictures and on terminals with 24-bit color.

Each scale begins near the background color, and its luminance changes monotonically, so color-blind readers can use it.
"v" is the sequential scale. "p" (blue) and "m" (orange) are the positive and negative halves of the diverging scale.
The other scales are the hues for the kinds of fields in a heat map.
"""

from __future__ import annotations

import os

LIGHT = {
    "v": ("#f3f4ee", "#d5e6ea", "#a9cbdb", "#78abc8", "#4a88b0", "#2a6596"),
    "p": ("#f3f4ee", "#c5d8ee", "#7fabd9", "#3a77b8", "#153f7a"),
    "m": ("#f3f4ee", "#f3cdac", "#de8d50", "#b4521c", "#702a08"),
    "gray": ("#f3f4ee", "#e2e3de", "#cfd0cc"),
    "blue": ("#f3f4ee", "#a8cdf5", "#4a94e0"),
    "amber": ("#f3f4ee", "#f4d591", "#dba126"),
    "pink": ("#f3f4ee", "#f7b3d6", "#e15c9f"),
}
DARK = {
    "v": ("#202127", "#1f3440", "#1d5560", "#21787a", "#34a08f", "#66c8a8"),
    "p": ("#202127", "#173962", "#2a63a8", "#5fa2ee", "#c4e0ff"),
    "m": ("#202127", "#562c16", "#a85420", "#ee8f4a", "#ffd6b0"),
    "gray": ("#202127", "#32343b", "#44464f"),
    "blue": ("#202127", "#2a5c96", "#62adff"),
    "amber": ("#202127", "#80601c", "#f2b83c"),
    "pink": ("#202127", "#8e3a68", "#ff74b8"),
}
# The background of a highlighted field, for light and dark backgrounds.
MARK = {"light": "#c2186b", "dark": "#d63384"}
# The text color on the scale "gray", which is meant to be inconspicuous.
QUIET = {"light": "#5f656c", "dark": "#a2a7b0"}
# Backgrounds of the four surprisal styles. The first style has the background of the page.
SURPRISE = {
    "light": ("", "#f9d3a0", "#e58c34", "#a0430a"),
    "dark": ("", "#5e3a16", "#a8621c", "#ffb869"),
}
STEPS = 25


def step(strength: float) -> int:
    """Return the step of a scale for a strength of 0 to 1."""
    return round((STEPS - 1) * strength)


def terminal_theme() -> str:
    """Return "light" or "dark", the background of the terminal.

    Some terminals set COLORFGBG to the numbers of their text and background colors. The default is "dark".
    """
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return "light" if background in {"7", *map(str, range(9, 16))} else "dark"


def steps(stops: tuple[str, ...]) -> list[str]:
    """Interpolate a scale of `STEPS` colors through the given colors."""
    colors = [bytes.fromhex(stop[1:]) for stop in stops]
    scale = []
    for step in range(STEPS):
        place = step / (STEPS - 1) * (len(colors) - 1)
        i = min(int(place), len(colors) - 2)
        mixed = [round(a + (b - a) * (place - i)) for a, b in zip(colors[i], colors[i + 1], strict=True)]
        scale.append("#" + bytes(mixed).hex())
    return scale


def ink_on(scale: str, color: str, theme: str) -> str:
    """The text color on a step of a scale.

    Args:
        scale: The name of the scale.
        color: The color of the step.
        theme: "light" or "dark".
    """
    return QUIET[theme] if scale == "gray" else ink(color)


def ink(color: str) -> str:
    """The text color that is legible on a background color: near-black or white."""
    return "#111111" if luminance(color) > 0.3 else "#ffffff"


def luminance(color: str) -> float:
    """The relative luminance of a color, 0 to 1 (WCAG 2)."""
    parts = (byte / 255 for byte in bytes.fromhex(color[1:]))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
