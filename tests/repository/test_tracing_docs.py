"""The numbers in the chapter 12-fact.md are those that SmolLM2 gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llama_scratch.llama import Llama
from llama_scratch.microscope.inspection import Inspection
from tests.helpers import ROOT

PAGE = (ROOT / "llama_scratch" / "book" / "12-fact.md").read_text()
ITALY = "The capital of Italy is"


@pytest.fixture(scope="module")
def seen(smollm2_fp32_path: Path) -> Inspection:
    return Llama.load(smollm2_fp32_path, precision="fp32", device="cpu").inspect("The capital of France is")


def shares(inspection: Inspection) -> dict[str, float]:
    """The probabilities of the candidates in percent."""
    return {candidate.text: 100 * candidate.probability for candidate in inspection.prediction.top}


@pytest.mark.slow
def test_the_fact_stands_at_the_country_and_from_layer_24_on_at_the_last_token(seen: Inspection) -> None:
    found = seen.trace(ITALY)
    assert (found.first_answer.text, found.second_answer.text) == (" Paris", " Rome")
    for layer, row in enumerate(found.moved):
        there = 3 if layer < 24 else 4
        assert row[there] > 0.95
        assert all(abs(moved) < 0.05 for position, moved in enumerate(row) if position != there)


def test_the_table_is_what_attribution_says(seen: Inspection) -> None:
    """The components, their contributions, and the probability of the answer if they are ablated."""
    found = seen.attribution(" Paris", " Rome")
    before = 100 * found.answer.probability
    rows = [
        f"| {c.contribution.name} | {c.contribution.logit:+.2f} | {before:.1f} → {100 * c.after:.1f} % |"
        for c in found.claims
    ]
    assert re.findall(r"\| L\S+ \|.*", PAGE) == [row.replace("-", "−") for row in rows]


def test_the_head_looks_at_the_country(seen: Inspection) -> None:
    assert round(100 * float(seen.attention[23, 4][-1, 3])) == 90


def test_without_the_head_it_is_some_capital(seen: Inspection) -> None:
    found = {text: round(share) for text, share in shares(seen.ablate("L23.H4")).items()}
    assert found[" Paris"] == 14
    assert found[" London"] == 11
    assert found[" Tokyo"] == 4


def test_with_italys_stream_it_is_rome(seen: Inspection) -> None:
    changed = seen.patch(ITALY, "L23", positions=3)
    before_and_after = {before.text: (before, after) for before, after in changed.effect().tokens}
    assert round(100 * before_and_after[" Rome"][1].probability) == 44
    assert f"{100 * before_and_after[' Paris'][1].probability:.1f}" == "0.1"
