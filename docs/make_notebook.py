"""Run the cells below and write docs/microscope.ipynb with their outputs.

    python -m docs.make_notebook

Outputs are saved as plain text and pictures. HTML outputs are removed, and appear again when the notebook is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FILE = Path(__file__).parent / "microscope.ipynb"

# Strings are Markdown cells, tuples are code cells.
CELLS: list[str | tuple[str]] = [
    """# A prompt under the microscope

`llama.inspect(prompt)` gives access to every number between a prompt and the next token. Nothing is computed before you
ask for it. Each result is a value whose docstring gives types and units; it displays itself here and prints with rich.
The model is SmolLM2-135M (`llama-scratch pull smollm2`); a directory with Llama 3.2 1B works the same way.""",
    (
        """from llama_scratch import Llama

llama = Llama.load("smollm2", precision="fp32")
seen = llama.inspect("The capital of France is")
seen""",
    ),
    """## What each layer predicts

The *logit lens* applies the final norm and the unembedding to the residual stream after every layer. Rows are layers,
columns are positions of the prompt.""",
    ("lens = seen.lens()\nlens",),
    (
        """answer = lens.answers[-1]
f"{answer.text!r} is the best guess from layer {lens.stays_from()} on\"""",
    ),
    """## Which components contribute

*Direct logit attribution* gives the contribution of every attention head and every feed-forward layer to the logit. If
the scale of the final norm is held constant, the contributions add up to the logit, except for rounding. The strongest
contributions are checked by ablation.""",
    ('why = seen.attribution(" Paris", versus=" Rome")\nwhy',),
    ("sum(part.logit for part in why.contributions) - why.logit",),
    """## Testing it

Head 4 of layer 23 contributes most to Paris over Rome. What does it attend to, and what remains if it is ablated?""",
    ("seen.head(23, 4)",),
    ('seen.ablate("L23.H4")',),
    """## Where the fact is

*Causal tracing*: replace one activation with that of another prompt, at each layer and position, and measure how far
the answer moves. Up to layer 23 the country is at its own token; then it is copied to the last token.""",
    ('seen.trace("The capital of Italy is")',),
    """## Changing the answer

Patch in an activation of another prompt, or add a direction to the residual stream.""",
    ("""seen.patch("The capital of Italy is", "L23", positions=3).prediction.next""",),
    (
        """film = llama.inspect("I watched the film yesterday and I thought it was")
film.steer(20, 1.0, toward="It was terrible", away="It was wonderful")""",
    ),
    """## The numbers themselves

Tensors for your own analysis: the residual stream, attention probabilities, and every place that
`llama_scratch.hooks` names.""",
    (
        """neurons = seen.activations("layers.5.feed_forward.neurons")
seen.residual[5].shape, seen.attention[5, 3].shape, neurons.shape""",
    ),
    (
        """import torch

# Norm of the residual stream at the last token, layer by layer.
torch.stack([stream[-1].norm() for stream in seen.residual])""",
    ),
]


def notebook() -> Any:
    """The notebook without outputs."""
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    for i, cell in enumerate(CELLS):
        found = nbformat.v4.new_code_cell(cell[0]) if isinstance(cell, tuple) else nbformat.v4.new_markdown_cell(cell)
        found["id"] = f"cell-{i}"
        made.cells.append(found)
    return made


def run(made: Any) -> Any:
    """Run all cells. Raises nbclient's `CellExecutionError` if one fails."""
    return NotebookClient(made, timeout=300, kernel_name="python3").execute()


def main() -> None:
    """Run the notebook and write it."""
    made = run(notebook())
    for cell in made.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("text/html", None)
    nbformat.write(made, FILE)


if __name__ == "__main__":
    main()
