"""Startup time; recorded by benchmarks/startup.py."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.layout import Bound, bounds_table, captioned, table, versions_text

# Name in startup.json → label in the report.
ROWS = {
    "python": "python, no imports",
    "torch": "import torch",
    "prompt": "start → prompt on the screen",
    "loaded": "start → model loaded",
    "echo": "keystroke → echo while loading, median",
    "slowest echo": "keystroke → echo while loading, maximum",
    "answer": "start → answer of --prompt",
    "int8": "start → answer of --prompt, int8",
    "first int8": "start → answer of --prompt, int8, kernels not compiled yet",
    "compile": "compiling the kernels",
}


def section(startup: dict[str, Any]) -> list[str]:
    """Render the section."""
    rows = [[ROWS[name], f"{1000 * value:,.0f} ms"] for name, value in startup["seconds"].items()]
    return [
        "## Start",
        f"{startup['model']}, medians of {startup['runs']} runs with a warm page cache, on a pseudo-terminal with 200 "
        "columns.",
        f"- Versions: {versions_text(startup['versions'])}",
        captioned(startup, table(["measure", "time"], rows)),
        "### Bounds of the start",
        captioned(startup, bounds_table(startup_bounds(startup))),
    ]


def startup_bounds(startup: dict[str, Any]) -> list[Bound]:
    """The bounds on the startup time."""
    seconds = startup["seconds"]
    prompt, over = seconds["prompt"], seconds["answer"] - seconds["torch"]
    bounds = [
        Bound("process start → prompt on the screen", "≤ 0.4 s", f"{prompt:.2f} s", prompt <= 0.4),
        Bound("process start → prompt on the screen", "≤ 0.25 s", f"{prompt:.2f} s", prompt <= 0.25, aim=True),
    ]
    if startup["model"] == "Llama3.2-1B":
        figure = f"import torch + {over:.2f} s"
        what = "process start → answer of --prompt, 1B in 16 bits"
        bounds.append(Bound(what, "≤ import torch + 0.9 s", figure, over <= 0.9))
    if compiling := seconds.get("compile"):
        bounds.append(Bound("compiling the kernels, once", "≤ 30 s", f"{compiling:.1f} s", compiling <= 30))
        waits = seconds["first int8"] - seconds["int8"]
        bounds.append(Bound("int8 answer, extra wait for the compiler", "≤ 0.3 s", f"{waits:.2f} s", waits <= 0.3))
    return bounds
