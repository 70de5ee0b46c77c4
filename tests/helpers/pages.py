"""A page with every kind of block, and texts that try to inject markup."""

from __future__ import annotations

from typing import Any

from llama_scratch.render.page import (
    Cell,
    Code,
    Gallery,
    Heatmap,
    Page,
    Paragraph,
    Running,
    Table,
    Window,
)
from llama_scratch.render.scale import Scale

HOSTILE = "</script><script>document.title='run'</script>\"'\u202e\x1b[31m$\\frac{$"


def ramp(high: int, wide: int, /, **how: Any) -> Heatmap:
    """A heatmap whose values grow from 0 to nearly 1, row by row.

    Args:
        high: Number of rows.
        wide: Number of columns.
        how: Other fields of the heatmap.
    """
    values = tuple(tuple((r * wide + c) / (high * wide) for c in range(wide)) for r in range(high))
    labels = {"rows": tuple(f"r{r}" for r in range(high)), "columns": tuple(f" c{c}" for c in range(wide))}
    return Heatmap(**({"title": "A map", "values": values} | labels | how))


def with_texts(columns: int, **how: Any) -> Heatmap:
    """A heatmap with texts, like a logit lens."""
    return ramp(3, columns, texts=tuple(tuple(f" t{r}{c}" for c in range(columns)) for r in range(3)), **how)


SIGNED = ramp(2, 3, values=((-1.0, -0.5, 0.0), (None, 0.5, 1.0)), scale=Scale(-1.0), tokens=False)
TABLE = Table(
    ("name", ">number", "bar"),
    tuple((Cell(f"n{i}"), Cell(f"{i}"), Cell(" a", token=True, bar=i / 4 - 0.5)) for i in range(5)),
    "A table",
    scroll=2,
)
EVERYTHING = Page(
    "Everything",
    (
        Paragraph("First", "bold"),
        Paragraph("A sentence with <b> in it.", "dim"),
        Running((Cell("After "), Cell(" Paris", "bold red", token=True, hover="3 bits"), Cell("\n", token=True))),
        TABLE,
        Paragraph("Second", "bold"),
        with_texts(30, window=Window(more="/lens {}")),
        ramp(4, 4),
        SIGNED,
        Gallery("All", tuple(ramp(12, 12, title=f"head {i}") for i in range(7))),
        Code("def f():\n    return 1\n", "llama_scratch/model.py", 41, (2,)),
        Running((Cell(HOSTILE, token=True, hover=HOSTILE),)),
        ramp(1, 1, title=HOSTILE, rows=(HOSTILE,), columns=(HOSTILE,), hovers=((HOSTILE,),)),
        Table((HOSTILE,), ((Cell(HOSTILE, hover=HOSTILE, bar=0.5),),), HOSTILE),
    ),
    ("lens", "attention"),
)
