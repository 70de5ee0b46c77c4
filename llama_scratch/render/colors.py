"""Colors of heat maps on web pages and in pictures.

Each scale begins near the paper's own color, and its luminance goes one way, so that it can be read by those who see
fewer colors. "v": values of which none is below 0. "p" and "m": those above and below 0, blue and orange.
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
    """The scale and the step in it for a level of −1 to 1, as `Heatmap.level` gives it."""
    return ("m" if level < 0 else "p") if signed else "v", round((STEPS - 1) * abs(level))


def steps(stops: tuple[str, ...]) -> list[str]:
    """A scale's colors, `STEPS` of them, from those that it goes through."""
    colors = [bytes.fromhex(stop[1:]) for stop in stops]
    scale = []
    for step in range(STEPS):
        place = step / (STEPS - 1) * (len(colors) - 1)
        i = min(int(place), len(colors) - 2)
        mixed = [round(a + (b - a) * (place - i)) for a, b in zip(colors[i], colors[i + 1], strict=True)]
        scale.append("#" + bytes(mixed).hex())
    return scale


def ink(color: str) -> str:
    """What is read well on a color: black or white."""
    return "#111111" if luminance(color) > 0.3 else "#ffffff"


def luminance(color: str) -> float:
    """Relative luminance, 0 to 1 (WCAG 2)."""
    parts = (byte / 255 for byte in bytes.fromhex(color[1:]))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
