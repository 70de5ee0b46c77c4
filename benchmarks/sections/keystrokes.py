"""Keystroke latency; recorded by benchmarks/keystrokes.py."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.layout import Bound, bounds_table, captioned, table, versions_text

# Phase → its name in the report, and the bound on the 95th percentile of its latencies in seconds.
_PHASES = {"loading": ("while torch is imported and the model loads", 0.15), "live": ("with live prediction", 0.03)}


def section(keystrokes: dict[str, Any]) -> list[str]:
    """Render the section."""
    rows = []
    for phase, figures in keystrokes["phases"].items():
        lags = [f"{1000 * figures[name]:,.0f} ms" for name in ("median_s", "p95_s", "longest_s")]
        rows.append([_PHASES[phase][0], f"{figures['keys']}", *lags])
    return [
        "## Typing",
        f"{keystrokes['model']}, one key every {1000 * keystrokes['interval_s']:.0f} ms on a pseudo-terminal with 200 "
        "columns: time from the key to the movement of the cursor.",
        f"- Versions: {versions_text(keystrokes['versions'])}",
        captioned(keystrokes, table(["phase", "keys", "median", "95th percentile", "maximum"], rows)),
        "### Bounds of typing",
        captioned(keystrokes, bounds_table(keystroke_bounds(keystrokes))),
    ]


def keystroke_bounds(keystrokes: dict[str, Any]) -> list[Bound]:
    """The bounds on keystroke latency."""
    bounds = []
    for phase, figures in keystrokes["phases"].items():
        name, limit = _PHASES[phase]
        p95 = figures["p95_s"]
        p95_text = f"{1000 * p95:.0f} ms"
        bounds.append(Bound(f"key → echo {name}, 95th percentile", f"≤ {1000 * limit:.0f} ms", p95_text, p95 <= limit))
    return bounds
