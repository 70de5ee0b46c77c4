"""Color scales of heat maps on web pages and in pictures.

Each scale begins near the background color, and its luminance changes monotonically, so color-blind readers can use it.
"v" is the sequential scale. "p" (blue) and "m" (orange) are the positive and negative halves of the diverging scale.
"""

from __future__ import annotations

LIGHT = {
    "v": ("#f3f4ee", "#d3e8d6", "#95cdbf", "#4da7b3", "#2a79a0", "#284f86", "#2a2358"),
    "p": ("#f3f4ee", "#c5d8ee", "#7fabd9", "#3a77b8", "#153f7a"),
    "m": ("#f3f4ee", "#f3cdac", "#de8d50", "#b4521c", "#702a08"),
}
DARK = {
    "v": ("#202127", "#2f2a5e", "#3a4b8c", "#2f7b8e", "#35a886", "#8fd354", "#fbe723"),
    "p": ("#202127", "#173962", "#2a63a8", "#5fa2ee", "#c4e0ff"),
    "m": ("#202127", "#562c16", "#a85420", "#ee8f4a", "#ffd6b0"),
}
STEPS = 25


def shade(level: float, signed: bool) -> tuple[str, int]:
    """Return the name of the scale and the step for a level.

    Args:
        level: The level, −1 to 1, from `Heatmap.level`.
        signed: Whether the scale diverges from 0.
    """
    return ("m" if level < 0 else "p") if signed else "v", round((STEPS - 1) * abs(level))


def steps(stops: tuple[str, ...]) -> list[str]:
    """Interpolate a scale of `STEPS` colors through the given ones."""
    colors = [bytes.fromhex(stop[1:]) for stop in stops]
    scale = []
    for step in range(STEPS):
        place = step / (STEPS - 1) * (len(colors) - 1)
        i = min(int(place), len(colors) - 2)
        mixed = [round(a + (b - a) * (place - i)) for a, b in zip(colors[i], colors[i + 1], strict=True)]
        scale.append("#" + bytes(mixed).hex())
    return scale


def ink(color: str) -> str:
    """The text color that is legible on a background color: near-black or white."""
    return "#111111" if luminance(color) > 0.3 else "#ffffff"


def luminance(color: str) -> float:
    """The relative luminance of a color, 0 to 1 (WCAG 2)."""
    parts = (byte / 255 for byte in bytes.fromhex(color[1:]))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
