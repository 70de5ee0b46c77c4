"""Write docs/microscope.ipynb from the cells below, and run it: what stands in it is what the code answered.

    python -m docs.make_notebook

Of each answer the plain text is kept, and the picture where one is drawn; a page with hover values appears where the
notebook is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FILE = Path(__file__).parent / "microscope.ipynb"

# Texts are markdown; code stands in tuples.
CELLS: list[str | tuple[str]] = [
    """# A prompt under the microscope

`llama.inspect(prompt)` looks at every number between a prompt and the next token. Nothing is computed before it is
asked for; each result is a value with types and units in its docstring, draws itself here, and prints with rich. The
model is SmolLM2-135M, which `llama-scratch pull smollm2` fetches; a directory with Llama 3.2 1B works the same way.""",
    (
        """from llama_scratch import Llama

llama = Llama.load("smollm2", precision="fp32")
seen = llama.inspect("The capital of France is")
seen""",
    ),
    """## What each layer would say

The *logit lens* reads the residual stream behind every layer as if it were the last one. A row is a layer, a column a
position of the prompt.""",
    ("lens = seen.lens()\nlens",),
    (
        """answer = lens.answers[-1]
f"{answer.text!r} is the best guess from layer {lens.stays_from()} on\"""",
    ),
    """## Who speaks for it

*Direct logit attribution*: what every attention head and every feed-forward layer adds to the logit. With the scale of
the last norm held they add up to it; the remainder is rounding. The strongest claims are tried out by switching the
part off.""",
    ('why = seen.attribution(" Paris", versus=" Rome")\nwhy',),
    ("sum(part.logit for part in why.contributions) - why.logit",),
    """## Trying it out

Head 4 of layer 23 speaks loudest for Paris and against Rome. What does it look at, and what is left without it?""",
    ("seen.head(23, 4)",),
    ('seen.ablate("L23.H4")',),
    """## Where the fact is

*Causal tracing*: put one activation of another prompt into this one, at each layer and position, and see how far the
answer moves. Up to layer 23 the country stands where it was named; then it is copied to the last token.""",
    ('seen.trace("The capital of Italy is")',),
    """## Changing what it says

Activations of one prompt in another, and a direction added to the stream.""",
    ("""seen.patch("The capital of Italy is", "L23", positions=3).prediction.next""",),
    (
        """film = llama.inspect("I watched the film yesterday and I thought it was")
film.steer(20, 1.0, toward="It was terrible", away="It was wonderful")""",
    ),
    """## The numbers themselves

Tensors, for whatever else there is to ask: the residual stream, attention probabilities, and any place that
`llama_scratch.hooks` names.""",
    (
        """neurons = seen.activations("layers.5.feed_forward.neurons")
seen.residual[5].shape, seen.attention[5, 3].shape, neurons.shape""",
    ),
    (
        """import torch

# How long the stream's vectors are, layer by layer, at the last token.
torch.stack([stream[-1].norm() for stream in seen.residual])""",
    ),
]


def notebook() -> Any:
    """The cells, not yet run."""
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    for i, cell in enumerate(CELLS):
        found = nbformat.v4.new_code_cell(cell[0]) if isinstance(cell, tuple) else nbformat.v4.new_markdown_cell(cell)
        found["id"] = f"cell-{i}"
        made.cells.append(found)
    return made


def run(made: Any) -> Any:
    """Run all cells; raises nbclient's `CellExecutionError` where one fails."""
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
