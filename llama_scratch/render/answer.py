"""Render a prediction for the user, on a terminal or as plain lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llama_scratch.render.bars import Bar
from llama_scratch.render.lines import json_line
from llama_scratch.render.text import indented, note, percent, readable, visible, warning
from llama_scratch.results import Candidate, Prediction

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.effect import Effect


def answer(prediction: Prediction) -> RenderableType:
    """Render a prediction: a frame around the most probable token, bars, and timing."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=24, vertical="middle")
    table.add_column(justify="right", no_wrap=True, vertical="middle")
    table.add_column(ratio=1, vertical="middle")
    best, *others = prediction.top
    framed = Panel(visible(best.text, "bold reverse green"), expand=False, style="green")
    table.add_row(framed, Text(percent(best.probability), style="bold"), Bar(best.probability))
    for candidate in others:
        # Indented by the width of the frame, to align the tokens.
        token = Text.assemble("  ", visible(candidate.text), "  ")
        table.add_row(token, Text(percent(candidate.probability)), Bar(candidate.probability))
    parts: list[RenderableType] = [Padding(table, (0, 0, 1, 1)), note(took(prediction))]
    return Group(*parts, *(warning(sentence) for sentence in prediction.warnings), Text())


def took(prediction: Prediction) -> str:
    """Format the line below an answer: entropy, tokens, cache hits, time, precision."""
    timing = prediction.timing
    plural = "" if timing.prompt_tokens == 1 else "s"
    reused = f", {timing.reused_tokens} cached" if timing.reused_tokens else ""
    milliseconds = f"{1000 * timing.prefill_s:,.0f} ms"
    cost = f"{timing.prompt_tokens} token{plural}{reused} · {milliseconds} · {prediction.model.precision}"
    return f"entropy {prediction.entropy_bits:.2f} bits · {cost}"


def context(text: str, accepted: str, width: int) -> RenderableType:
    """Render the end of the text so far, followed by the accepted text in bold.

    Args:
        text: The text so far.
        accepted: The text that was just accepted.
        width: Width of the terminal in cells.
    """
    old, new = readable(text), readable(accepted)
    room = max(8, 4 * width - len(new))
    if len(old) > room:
        old = "…" + old[-room:]
    return Padding(Text.assemble((old, "dim"), (new, "bold green")), (0, 0, 0, 1))


def plain_answer(prediction: Prediction) -> str:
    """Render a prediction as plain lines for screen readers."""
    lines = [_plain_candidate("Next token", prediction.next)]
    lines += [_plain_candidate(f"Number {rank}", c) for rank, c in enumerate(prediction.top[1:], start=2)]
    lines += [f"Entropy {prediction.entropy_bits:.2f} bits."]
    return "\n".join(lines + [f"Note: {sentence}" for sentence in prediction.warnings])


def _plain_candidate(title: str, candidate: Candidate) -> str:
    return f"{title}: {json_line(candidate.text)}, {percent(candidate.probability)}"


def effect(with_it: Candidate, without: Candidate) -> RenderableType:
    """Compare the answers with and without the prompt's last token.

    Args:
        with_it: The next token after the whole prompt.
        without: The next token if the last token of the prompt is left out, as a warning suggests.
    """
    parts = [
        f"{when} {visible(candidate.text).plain} {percent(candidate.probability)}"
        for when, candidate in (("With that token:", with_it), ("without it:", without))
    ]
    return indented(", ".join(parts) + ".", "yellow")


def before_and_after(effect: Effect) -> RenderableType:
    """Render the effect of interventions on an answer, in one line."""
    parts = [
        f"{visible(before.text).plain} {percent(before.probability)} → {percent(after.probability)}"
        for before, after in effect.answers
    ]
    return Group(indented(f"{', '.join(effect.labels)}: {', '.join(parts)}.", "magenta"), Text())
