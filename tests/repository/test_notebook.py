"""The notebook in docs: it has the cells of docs/make_notebook.py, and every cell runs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from docs.make_notebook import CELLS, FILE, notebook, run


def test_it_holds_the_cells_of_its_script_and_an_answer_to_each() -> None:
    """Neither was edited without the other."""
    kept = nbformat.read(FILE, as_version=4)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in notebook().cells]
    assert all(cell.outputs for cell in kept.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_it_runs(smollm2_path: Path) -> None:
    """Each cell gives its recorded output again; results that display themselves also give an HTML page."""
    made = run(notebook())
    kept = nbformat.read(FILE, as_version=4)
    pairs = [pair for pair in zip(made.cells, kept.cells, strict=True) if pair[0].cell_type == "code"]
    assert len(pairs) == sum(isinstance(cell, tuple) for cell in CELLS)
    drawn = 0
    for new, old in pairs:
        (output,) = new.outputs
        text, before = output.data["text/plain"], old.outputs[0].data["text/plain"]
        # Only words are compared: numbers differ by rounding, and times differ anyway.
        assert [word for word in text.split() if word.isalpha()] == [word for word in before.split() if word.isalpha()]
        drawn += "<iframe" in output.data.get("text/html", "")
    assert drawn == 7


def test_a_cell_that_fails_is_seen() -> None:
    """So the test above can fail."""
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError):
        run(broken)
