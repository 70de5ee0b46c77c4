"""A prompt under the microscope."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, Running
from llama_scratch.render.pages import answer, effect

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.inspection import Inspection


def page(inspection: Inspection) -> Page:
    """Return a page with the prompt and its prediction.

    With interventions, the predictions before and after are shown.
    """
    if inspection.interventions:
        changed = effect.page(inspection.effect())
        text = Running(tuple(Cell(token.text, token=True) for token in inspection.tokens))
        return replace(changed, parts=(text, *changed.parts))
    return replace(answer.page(inspection.prediction), source=("inspection",))
