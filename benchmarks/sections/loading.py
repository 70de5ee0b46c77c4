"""How long a model takes to load from each file format, and its memory; recorded by benchmarks/loading.py."""

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
    head = ["form", "loaded", "first answer", "last form", "file", "private", "at most", "at the end", "mapped"]
    return [
        "## Loading",
        f"One model of Llama 3.2 1B's shape in every form; medians of {loading['rounds']} rounds in which all take "
        f"turns, each in a process of its own, {loading['threads']} threads, the disk's cache warm, torch imported. "
        "“Private” memory is the process's own: the most until the first answer, the most until the weights are in "
        "their last form, and what stays. “Mapped” are pages of files, which the system takes back when it needs to.",
        f"- Versions: {versions_text(loading['versions'])}",
        captioned(loading, table(head, rows)),
    ]
