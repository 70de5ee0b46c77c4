"""What `verify` found: a table for people, lines for a pipe."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llama_scratch.checkpoint.findings import Verification

_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def verify_table(found: Verification) -> RenderableType:
    """Each finding behind its result, and the verdict below; fits into 40 columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found.findings:
        what = Text.assemble((finding.part, "bold"), "  ", finding.sentence)
        table.add_row(Text(finding.result, style=_STYLES[finding.result]), what)
    verdict = Text(found.verdict, style="bold red" if found.wrong else "bold green")
    return Group(Padding(table, (0, 0, 1, 1)), Padding(verdict, (0, 0, 0, 1)))


def verify_lines(found: Verification) -> list[str]:
    """The same, a finding a line."""
    return [f"{f.result}: {f.part}: {f.sentence}" for f in found.findings] + [found.verdict]
