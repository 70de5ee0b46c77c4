"""The strongest neurons of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Finding, Page, Paragraph, Table, written
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # they import torch
    from llama_scratch.microscope.neurons import LogitEffect, Neuron, Neurons

_SOURCE = ("neurons", "FeedForward")
# A neuron accounts for its layer's effect if it has at least this share of it.
_ACCOUNTS = 0.5


def page(neurons: Neurons) -> Page:
    """Return a page of neurons: activation, norm, direct effect, and tokens."""
    largest = max(abs(neuron.contribution) for neuron in neurons.neurons) or 1.0
    rows = tuple(_row(neurons, neuron, largest) for neuron in neurons.neurons)
    total = sum(neuron.contribution for neuron in neurons.neurons)
    where = (
        f"At {written(neurons.token.text, token=True)}, all {neurons.n_neurons:,} neurons contribute "
        f"{neurons.contribution:+z.2f}; these {len(rows)} contribute {total:+z.2f}."
    )
    return Page(
        f"Neurons of layer {neurons.layer}",
        (
            Finding(finding(neurons)),
            Paragraph(where),
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


def finding(neurons: Neurons) -> str:
    """State the effect on the answer's logit, and whether one neuron accounts for it."""
    answer = f"{written(neurons.answer.text, token=True)} ({percent(neurons.answer.probability)})"
    layer = (
        f"The feed-forward network of layer {neurons.layer} contributes {neurons.contribution:+z.2f} to the logit of "
        f"{answer}"
    )
    sign = 1.0 if neurons.contribution >= 0 else -1.0
    most = max(neurons.neurons, key=lambda neuron: sign * neuron.contribution)
    if sign * most.contribution >= _ACCOUNTS * abs(neurons.contribution) > 0:
        offset = ", and other neurons offset part of it" if abs(most.contribution) > abs(neurons.contribution) else ""
        return f"{layer}; neuron {most.index} alone contributes {most.contribution:+z.2f}{offset}."
    return (
        f"{layer}. No single neuron of the {len(neurons.neurons)} with the largest output accounts for half of that: "
        f"neuron {most.index} contributes {most.contribution:+z.2f}."
    )


def _row(neurons: Neurons, neuron: Neuron, largest: float) -> tuple[Cell, ...]:
    verb = "raises" if neuron.contribution >= 0 else "lowers"
    answer = written(neurons.answer.text, token=True)
    hover = f"Neuron {neuron.index} {verb} the logit of {answer} by {abs(neuron.contribution):.3f}"
    return (
        Cell(f"{neuron.index}"),
        Cell(f"{neuron.activation:.2f}"),
        Cell(f"{neuron.strength:.2f}"),
        Cell(f"{neuron.contribution:+z.2f}", bar=neuron.contribution / largest, hover=hover),
    )


def _pushed(verb: str, tokens: dict[int, tuple[LogitEffect, ...]]) -> Table:
    rows = tuple(
        (
            Cell(f"{index}"),
            *(Cell(token.text, token=True, hover=_effect(index, token)) for token in most),
        )
        for index, most in tokens.items()
    )
    width = len(rows[0]) - 1
    return Table((">neuron", verb, *[""] * (width - 1)), rows, f"Tokens that each neuron {verb} most")


def _effect(neuron: int, token: LogitEffect) -> str:
    verb = "raises" if token.logit >= 0 else "lowers"
    return f"Neuron {neuron} {verb} the logit of {written(token.text, token=True)} by {abs(token.logit):.3f}"
