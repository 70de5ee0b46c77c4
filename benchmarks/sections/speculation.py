"""What drafts from the text itself gain and cost; recorded by benchmarks/speculation.py."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.layout import Bound, bounds_table, captioned, table, versions_text

# Kind of texts → its name and its least speed, in times of plain decoding.
_MIN_RATIOS = {"repeats": ("text that repeats itself", 1.5), "does not": ("text that does not", 0.98)}
_MIN_COMPARED = 10_000  # tokens


def section(speculation: dict[str, Any]) -> list[str]:
    """Render the section."""
    names = {kind: name for kind, (name, _) in _MIN_RATIOS.items()} | {"many": "many openings, greedy"}
    head = ["texts", "number", "plain", "with guesses", "ratio", "tokens compared", "differ"]
    rows = [
        [
            f"{precision}, {names[kind]}",
            f"{texts['texts']}",
            f"{texts['plain']:,.0f}",
            f"{texts['drafts']:,.0f}",
            f"{texts['ratio']:.2f}",
            f"{texts['compared']:,}",
            f"{texts['differ']}",
        ]
        for precision, kinds in speculation["precisions"].items()
        for kind, texts in kinds.items()
    ]
    return [
        "## Guesses from the text itself",
        f"{speculation['model']}, up to {speculation['tokens']} tokens behind each text, generated with guesses that "
        f"are computed ahead and without, in turns, {speculation['rounds']} rounds (one of the many openings), "
        f"{speculation['threads']} threads: medians of tokens a second, and of the ratios within a turn. What does not "
        "repeat itself is drawn at a temperature of 1. Tokens differ where an id or a bit of its log probability does.",
        f"- Versions: {versions_text(speculation['versions'])}",
        captioned(speculation, table(head, rows)),
        "### Bounds of guesses",
        captioned(speculation, bounds_table(speculation_bounds(speculation))),
    ]


def speculation_bounds(speculation: dict[str, Any]) -> list[Bound]:
    """The bounds on what guesses from the text itself gain and cost, and that they change nothing."""
    bounds = []
    for precision, kinds in speculation["precisions"].items():
        for kind, (name, least) in _MIN_RATIOS.items():
            ratio = kinds[kind]["ratio"]
            bounds.append(Bound(f"{precision}, {name}", f"≥ {least} × plain", f"{ratio:.2f}", ratio >= least))
        compared, differ = kinds["many"]["compared"], sum(texts["differ"] for texts in kinds.values())
        met = compared >= _MIN_COMPARED and not differ
        expected, figure = f"0 of ≥ {_MIN_COMPARED:,} differ", f"{differ} of {compared:,}"
        bounds.append(Bound(f"{precision}, tokens of many openings, greedy", expected, figure, met))
    return bounds
