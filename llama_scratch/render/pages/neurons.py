"""The strongest neurons of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, Paragraph, Running, Table
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # they bring torch
    from llama_scratch.microscope.neurons import LogitEffect, Neuron, Neurons

_SOURCE = ("neurons", "FeedForward")


def page(neurons: Neurons) -> Page:
    """Return a page of neurons: activation, norm, direct effect, and tokens."""
    largest = max(abs(neuron.contribution) for neuron in neurons.neurons) or 1.0
    rows = tuple(_row(neuron, largest) for neuron in neurons.neurons)
    total = sum(neuron.contribution for neuron in neurons.neurons)
    where = (
        Cell(f"Layer {neurons.layer} at "),
        Cell(neurons.token.text, "cyan", token=True),
        Cell(f": all {neurons.n_neurons:,} neurons contribute {neurons.contribution:+z.2f} to the logit of "),
        Cell(neurons.answer.text, "bold", token=True),
        Cell(f" ({percent(neurons.answer.probability)}); these {len(rows)} contribute {total:+z.2f}."),
    )
    return Page(
        f"Neurons of layer {neurons.layer}",
        (
            Running(where),
            Table((">neuron", ">activation", ">norm", "direct effect"), rows, "Neurons with the largest output norm"),
            _pushed("promotes", {neuron.index: neuron.promoted for neuron in neurons.neurons}),
            _pushed("suppresses", {neuron.index: neuron.suppressed for neuron in neurons.neurons}),
            Paragraph(
                "norm: |activation| · ‖column of w2‖, the norm of the output of a neuron. direct effect: that output "
                "through the final norm, at the scale of the final residual stream, and the unembedding, without "
                "later layers.",
                "dim",
            ),
        ),
        _SOURCE,
    )


def _row(neuron: Neuron, largest: float) -> tuple[Cell, ...]:
    return (
        Cell(f"{neuron.index}"),
        Cell(f"{neuron.activation:.2f}"),
        Cell(f"{neuron.strength:.2f}"),
        Cell(f"{neuron.contribution:+z.2f}", bar=neuron.contribution / largest),
    )


def _pushed(verb: str, tokens: dict[int, tuple[LogitEffect, ...]]) -> Table:
    rows = tuple(
        (Cell(f"{index}"), *(Cell(token.text, token=True, hover=f"{token.logit:+.3f}") for token in most))
        for index, most in tokens.items()
    )
    width = len(rows[0]) - 1
    return Table((">neuron", verb, *[""] * (width - 1)), rows, f"Tokens that each neuron {verb} most")
