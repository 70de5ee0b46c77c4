"""The measurements that a report begins with."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_scratch.llama import Llama
from llama_scratch.microscope.attention import attention_map
from llama_scratch.microscope.attribution import why
from llama_scratch.microscope.lens import lens
from llama_scratch.microscope.summary import CHECKED, Summary, summary
from llama_scratch.render.pages.report import finding

FACT = "The capital of France is"


def measured(llama: Llama, text: str) -> Summary:
    """Measure the prediction after a text."""
    ids = llama.encode(text)
    return summary(llama, ids, why(llama, ids))


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


def test_links_are_the_attention_of_the_last_token(tiny: Llama) -> None:
    view = measured(tiny, FACT)
    ids = tiny.encode(FACT)
    assert len(view.links) == tiny.args.n_layers * tiny.args.n_heads
    for layer in range(tiny.args.n_layers):
        last = attention_map(tiny, ids, layer)[:, -1]  # (n_heads, T)
        for head in range(tiny.args.n_heads):
            links = view.links[f"L{layer}.H{head}"]
            assert [link.share for link in links] == sorted((link.share for link in links), reverse=True)
            assert links[0].share == pytest.approx(float(last[head].max()), abs=1e-6)
            for link in links:
                assert link.share == pytest.approx(float(last[head, link.position]), abs=1e-6)


def test_ablations_are_those_of_an_inspection(tiny: Llama) -> None:
    view = measured(tiny, FACT)
    heads = [each for each in view.ablations if each.name in view.links]
    assert len(heads) >= CHECKED
    for each in view.ablations:
        effect = tiny.inspect(FACT).ablate(each.name).effect(top=tiny.args.vocab_size)
        after = next(after for before, after in effect.tokens if before.id == view.attribution.answer.id)
        assert each.after == pytest.approx(after.probability, rel=1e-4)
    assert view.head == min(heads, key=lambda each: each.after)


def test_the_lens_is_that_of_lens(tiny: Llama) -> None:
    """Up to rounding: recording attention takes another code path."""
    ours, expected = measured(tiny, FACT).lens, lens(tiny, tiny.encode(FACT))
    assert ours.tokens == expected.tokens
    for row, other in zip(ours.layers, expected.layers, strict=True):
        for guess, same in zip(row.guesses, other.guesses, strict=True):
            assert (guess.id, guess.rank_of_answer) == (same.id, same.rank_of_answer)
            assert guess.logprob == pytest.approx(same.logprob, abs=1e-4)


def test_a_fact_is_read_by_one_head(smollm2_fp32_path: Path) -> None:
    """The example of docs/fact.md."""
    llama = Llama.load(smollm2_fp32_path, precision="fp32", device="cpu")
    view = measured(llama, FACT)
    assert view.head is not None
    assert view.head.name == "L23.H4"
    assert finding(view) == (
        "␣Paris, 77.3 %. ␣France is read by head L23.H4 at ␣is (90.3 % of its attention); without this head, ␣Paris "
        "falls to 14.1 %; ␣Paris is the top prediction from layer 29 on."
    )
