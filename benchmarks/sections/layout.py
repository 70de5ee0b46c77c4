"""Building blocks of the report: bounds, tables and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GB = 1e9
AVX2 = " (AVX2)"  # suffix of engines that may only use AVX2


@dataclass(frozen=True)
class Bound:
    """A bound and the measured figure, both as text.

    Args:
        what: The measured quantity.
        expected: The bound.
        found: The figure.
        met: Whether the figure is within the bound.
        aim: Whether the bound is a target instead of a requirement.
        stated: Whether the figure is reported without a verdict, because the bound does not apply to this CPU.
    """

    what: str
    expected: str
    found: str
    met: bool
    aim: bool = False
    stated: bool = False

    @property
    def verdict(self) -> str:
        """The text of the last column."""
        if self.stated:
            return "informational"
        return "met" if self.met else "target missed" if self.aim else "**not met**"

    def __str__(self) -> str:
        return f"{self.what}: {self.found}, expected {self.expected}: {self.verdict.strip('*')}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    """Render a Markdown table.

    Args:
        head: Titles of the columns.
        rows: Cells of each row.
        align: Markdown's alignment of all columns except the first.
    """
    lines = [head, ["---", *(align for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bounds_table(bounds: Sequence[Bound]) -> str:
    """Render the bounds, each with its verdict."""
    if not bounds:
        return "The measurements do not cover any of the bounds."
    rows = [[bound.what, bound.expected, bound.found, bound.verdict] for bound in bounds]
    return table(["measure", "bound", "measured", "verdict"], rows, align="---")


def captioned(recorded: dict[str, Any], table: str) -> str:
    """Render a table with a caption that names the CPU.

    Args:
        recorded: Content of a .json file.
        table: The table in Markdown.
    """
    return f"{_caption(recorded)}\n\n{table}"


def _caption(recorded: dict[str, Any]) -> str:
    """Describe the CPU of a recorded file and the instruction sets of our kernels."""
    machine = recorded.get("machine")
    if not machine:
        return "CPU: not recorded."
    features = ", ".join(machine["features"]) or "features unknown"
    text = f"CPU: {machine['cpu']} ({features})."
    if "kernels" in machine:
        text += f" Our kernels: {machine['kernels'] or 'none'}"
        engines = recorded.get("engines", {}).items()
        limited = {engine["kernels"] for name, engine in engines if name.endswith(AVX2) and engine["kernels"]}
        text += "".join(f"; in rows marked{AVX2}: {kernels}" for kernels in sorted(limited)) + "."
    return text


def versions_text(versions: dict[str, str]) -> str:
    """Format packages and versions on one line."""
    return ", ".join(f"{package} {number}" for package, number in versions.items())


def percent(share: float | None, digits: int = 0) -> str:
    """Format a share in percent, or as a dash if it was not measured.

    Args:
        share: The share, from 0 to 1.
        digits: Number of decimals.
    """
    return "–" if share is None else f"{100 * share:.{digits}f} %"
