"""Prompt lookup decoding; recorded by benchmarks/speculation.py."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.layout import Bound, bounds_table, captioned, table, versions_text

# Kind of texts → its name in the report, and the minimum speed relative to plain decoding.
_MIN_RATIOS = {"repeats": ("repetitive text", 1.5), "does not": ("other text", 0.98)}
_MIN_COMPARED = 10_000  # tokens


def section(speculation: dict[str, Any]) -> list[str]:
    """Render the section."""
    names = {kind: name for kind, (name, _) in _MIN_RATIOS.items()} | {"many": "many prompts, greedy"}
    head = ["texts", "number", "plain", "prompt lookup", "ratio", "tokens compared", "different"]
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
        "## Prompt lookup decoding",
        f"{speculation['model']}, up to {speculation['tokens']} tokens after each text, generated alternately with "
        f"prompt lookup and without, {speculation['rounds']} rounds (one round of the many prompts), "
        f"{speculation['threads']} threads: median tokens per second, and medians of the ratios within a round. "
        "Other text is sampled at temperature 1. Tokens are different if the id or any bit of the log probability is.",
        f"- Versions: {versions_text(speculation['versions'])}",
        captioned(speculation, table(head, rows)),
        "### Bounds of prompt lookup decoding",
        captioned(speculation, bounds_table(speculation_bounds(speculation))),
    ]


def speculation_bounds(speculation: dict[str, Any]) -> list[Bound]:
    """The bounds on the speed of prompt lookup decoding, and on equal results."""
    bounds = []
    for precision, kinds in speculation["precisions"].items():
        for kind, (name, least) in _MIN_RATIOS.items():
            ratio = kinds[kind]["ratio"]
            bounds.append(Bound(f"{precision}, {name}", f"≥ {least} × plain", f"{ratio:.2f}", ratio >= least))
        compared, differ = kinds["many"]["compared"], sum(texts["differ"] for texts in kinds.values())
        met = compared >= _MIN_COMPARED and not differ
        expected, figure = f"0 of ≥ {_MIN_COMPARED:,} different", f"{differ} of {compared:,}"
        bounds.append(Bound(f"{precision}, tokens of many prompts, greedy", expected, figure, met))
    return bounds
