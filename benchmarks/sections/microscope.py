"""Run time and overhead of the microscope; recorded by benchmarks/microscope.py."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.layout import Bound, bounds_table, captioned, table, versions_text

# Maximum seconds of /lens and /why.
_LIMITS_S = {"SmolLM2-135M-Instruct": {"lens": 2, "why": 3}, "Llama3.2-1B": {"lens": 8, "why": 20}}
# Two identical networks differ by this factor within one run.
_MAX_DECODE_RATIO = 1.03
# Labels that replace recorded ones.
_LABELS = {"never tapped": "decode of one token, no hooks", "tapped before": "decode of one token, hooks removed"}


def section(microscope: dict[str, Any]) -> list[str]:
    """Render the section."""
    models = microscope["models"]
    rows = [
        [_LABELS.get(row, name), *(f"{1000 * model['seconds'][row]:,.1f} ms" for model in models)]
        for row, name in microscope["rows"].items()
    ]
    return [
        "## The microscope",
        f"Medians of {microscope['runs']} runs with different texts, and of {microscope['tokens']} tokens that a "
        "network without hooks and a network with removed hooks decode alternately; "
        f"{microscope['threads']} threads, weights packed.",
        f"- Versions: {versions_text(microscope['versions'])}",
        captioned(microscope, table(["step", *(f"{model['name']}, {model['precision']}" for model in models)], rows)),
        "### Bounds of the microscope",
        captioned(microscope, bounds_table(microscope_bounds(microscope))),
    ]


def microscope_bounds(microscope: dict[str, Any]) -> list[Bound]:
    """The bounds on the microscope's run time, and on its cost when it is not used."""
    bounds = []
    for model in microscope["models"]:
        for row, limit in _LIMITS_S.get(model["name"], {}).items():
            seconds, what = model["seconds"][row], f"{microscope['rows'][row]}, {model['name']}"
            bounds.append(Bound(what, f"≤ {limit} s", f"{seconds:.2f} s", seconds <= limit))
        what, ratio = f"decode, hooks removed ÷ no hooks, {model['name']}", model["ratio"]
        bounds.append(Bound(what, f"≤ {_MAX_DECODE_RATIO}", f"{ratio:.3f}", ratio <= _MAX_DECODE_RATIO))
    return bounds
