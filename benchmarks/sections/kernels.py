"""Speed of the kernels per instruction set; recorded by benchmarks/kernels.py."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.layout import GB, captioned, table, versions_text


def section(kernels: dict[str, Any]) -> list[str]:
    """Render the section."""
    cases = kernels["cases"]
    sets = list(dict.fromkeys(name for case in cases for name in case["seconds"]))
    rows = []
    for case in cases:
        figures = kernel_figures(case)
        shape = f"{case['out']:,} × {case['in']:,}"
        rows.append([kernel_case(case), shape, *(figures.get(name, "–") for name in sets)])
    return [
        "## Kernels",
        "One thread multiplies rows of activations by random weights. Figures are medians of "
        f"{kernels['rounds']} rounds in which the instruction sets alternate. A single row is memory-bound, so its "
        "figure is weight bytes per second. “any machine” is portable C++. "
        + ("All sets give bitwise equal results." if kernels["same_bits"] else "**The sets give different results.**"),
        f"- Versions: {versions_text(kernels['versions'])}",
        captioned(kernels, table(["product", "weight", *sets], rows)),
    ]


def kernel_figures(case: dict[str, Any]) -> dict[str, str]:
    """Return the speed with each instruction set, as text.

    The unit is weight bytes per second for one row of activations, and operations per second for several rows.
    """
    if case["rows"] == 1:
        return {name: f"{case['weight_bytes'] / seconds / GB:.1f} GB/s" for name, seconds in case["seconds"].items()}
    operations = 2 * case["rows"] * case["out"] * case["in"]
    return {name: f"{operations / seconds / GB:,.0f} GOP/s" for name, seconds in case["seconds"].items()}


def kernel_case(case: dict[str, Any]) -> str:
    """Label of a case: the kind of weight and the number of rows."""
    return f"{case['kind']}, {case['rows']} {'row' if case['rows'] == 1 else 'rows'}"
