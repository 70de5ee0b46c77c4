"""The colors of pages and exported screens, for a light and a dark background."""

from __future__ import annotations

LIGHT_PALETTE = {
    "paper": "#fcfcfa", "ink": "#1f2328", "soft": "#626a73", "line": "#e3e3dd", "panel": "#f4f4ef",
    "tip": "#1f2328", "tip-ink": "#fcfcfa", "bar": "#3a77b8", "less": "#c2602a", "mark": "#fdf0c4",
    "red": "#b3261e", "green": "#1a7340", "yellow": "#8a6100", "blue": "#2457a6", "magenta": "#9a2c8e",
    "cyan": "#0b6e7f",
}  # fmt: skip
DARK_PALETTE = {
    "paper": "#17181d", "ink": "#e4e4e0", "soft": "#9aa0a8", "line": "#33353d", "panel": "#1f2127",
    "tip": "#e9e9e4", "tip-ink": "#17181d", "bar": "#5fa2ee", "less": "#ee8f4a", "mark": "#3d3512",
    "red": "#ff8a80", "green": "#7fd6a0", "yellow": "#e5c15c", "blue": "#8ab8ff", "magenta": "#e79be0",
    "cyan": "#73d3e0",
}  # fmt: skip
