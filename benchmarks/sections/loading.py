"""Load time and memory for each file format; recorded by benchmarks/loading.py."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.layout import GB, captioned, table, versions_text


def section(loading: dict[str, Any]) -> list[str]:
    """Render the section."""
    rows = []
    for row in loading["rows"]:
        times = [f"{row[f'{moment}_s']:.1f} s" for moment in ("loaded", "answered", "prepared")]
        sizes = [row["bytes"], row["answered_private"], row["prepared_private"], row["private"], row["mapped"]]
        rows.append([f"{row['form']}, {row['precision']}", *times, *(f"{size / GB:.2f} GB" for size in sizes)])
    head = ["format", "loaded", "first answer", "packed", "file", "private", "until packed", "at the end", "mapped"]
    return [
        "## Loading",
        f"One model with the shape of Llama 3.2 1B in every file format: medians of {loading['rounds']} alternating "
        f"rounds, each load in a new process, {loading['threads']} threads, warm page cache, torch already imported. "
        "“Packed” is the time until the weights are in their fast format. “Private” memory excludes file pages: the "
        "peak until the first answer, the peak until the weights are packed, and the size at the end. “Mapped” is "
        "the size of the mapped file pages, which the system can reclaim.",
        f"- Versions: {versions_text(loading['versions'])}",
        captioned(loading, table(head, rows)),
    ]
