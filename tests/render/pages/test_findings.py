"""The sentences that views begin with, for constructed results with and without a clear finding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llama_scratch.llama import Llama
from llama_scratch.microscope.choices import Choice, Choices
from llama_scratch.microscope.compare import Comparison, ModelPrediction
from llama_scratch.microscope.diff import Diff, Pair
from llama_scratch.microscope.effect import Effect
from llama_scratch.microscope.neurons import Neuron, Neurons
from llama_scratch.microscope.numerics import Distance, Numerics, Row
from llama_scratch.microscope.patching import Trace, trace
from llama_scratch.render.page import Finding
from llama_scratch.render.pages import choices, compare, diff, effect, neurons, numerics, patching
from llama_scratch.results import Candidate, ModelInfo, Token
from tests.helpers import smollm2

llama, weights = smollm2.llama, smollm2.weights


def candidate(text: str, probability: float) -> Candidate:
    return Candidate(sum(map(ord, text)), text, math.log(probability))


PARIS, ROME = candidate(" Paris", 0.773), candidate(" Rome", 0.6)
TOKENS = tuple(Token(i, text) for i, text in enumerate(["The", " capital", " of", " France", " is"]))


# --- /patch -----------------------------------------------------------------------------------


def traced(*carriers: int | None, share: float = 0.9) -> Trace:
    """A trace in which these positions carry the answer, row by row."""
    moved = tuple(tuple(share if at == carrier else 0.1 for at in range(len(TOKENS))) for carrier in carriers)
    return Trace(TOKENS, TOKENS, PARIS, ROME, moved)


@pytest.mark.reference
def test_the_answer_moves_where_the_grid_says_so(llama: Llama) -> None:
    """From the country to the last token, in the layer of L23.H4."""
    found = trace(llama, llama.encode("The capital of France is"), llama.encode("The capital of Italy is"))
    assert min(row[3] for row in found.moved[:24]) > 0.9
    assert min(row[4] for row in found.moved[24:]) > 0.9
    sentence = patching.finding(found)
    assert sentence == "The answer moves from ␣France to ␣is between layers 23 and 24."
    assert patching.page(found).parts[0] == Finding(sentence)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (traced(4, 4, 4), "The answer stays at ␣is in all layers."),
        (traced(3, None, None, 4), "The answer moves from ␣France to ␣is between layer 0 and the end."),
        (traced(3, 1, 4, 4), "from ␣France to ␣capital between layers 0 and 1, then from ␣capital to ␣is between"),
        (traced(None, 3, 4, 4), "at first; from L1 on, ␣France does. Then it moves from ␣France to ␣is between layers"),
        (traced(None, 4, 4), "No single position carries the answer at first; from L1 on, ␣is does."),
        (traced(3, 4, 3, 4, 3, 3), "moves 4 times between positions, at last from ␣is to ␣France between layers 3"),
        (traced(3, 4, share=0.49), "No single position carries the answer: patching one moves at most 0.49"),
    ],
)
def test_the_finding_of_a_trace(found: Trace, expected: str) -> None:
    assert expected in patching.finding(found)


def test_a_token_that_occurs_twice_has_its_position() -> None:
    twice = tuple(replace(token, id=7) for token in TOKENS)
    sentence = patching.finding(replace(traced(3, 4, 4), first=twice))
    assert "␣France at position 3 to ␣is at position 4" in sentence


# --- /neurons ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "own", "expected"),
    [
        (2.0, [0.3, 1.0, -3.0], "contributes +2.00 to the logit of ␣Paris (77.3 %); neuron 1 alone contributes +1.00."),
        (2.0, [0.3, 0.99], "No single neuron of the 2 with the largest output accounts for half of that: neuron 1"),
        (-2.0, [3.0, -1.5], "neuron 1 alone contributes -1.50."),
        (-0.1, [3.0, -1.5], "neuron 1 alone contributes -1.50, and other neurons offset part of it."),
        (0.0, [0.0, 0.0], "No single neuron"),
    ],
)
def test_the_finding_of_a_layers_neurons(total: float, own: list[float], expected: str) -> None:
    each = tuple(Neuron(i, 1.0, 1.0, contribution, (), ()) for i, contribution in enumerate(own))
    assert expected in neurons.finding(Neurons(3, TOKENS[-1], PARIS, total, each, 99))


# --- Two predictions --------------------------------------------------------------------------


def test_the_finding_of_two_texts() -> None:
    pair = Pair(4, 4, TOKENS[-1], 0.5, PARIS, ROME)
    apart = Diff(TOKENS, TOKENS, 3, (pair,), (PARIS,), (ROME,), 0.826)
    sentence = diff.finding(apart)
    assert "␣Paris (77.3 %) follows the first text, ␣Rome (60.0 %) the second" in sentence
    assert "0.83 of at most 1 bit" in sentence
    assert "first differ after ␣is: ␣Paris and ␣Rome" in sentence
    same = Diff(TOKENS, TOKENS, 5, (), (PARIS,), (PARIS,), 0.0)
    assert diff.finding(same) == "␣Paris follows both texts (77.3 % and 77.3 %). The predictions are equal."
    assert diff.page(same).parts[0] == Finding(diff.finding(same))


def compared(second: Candidate, kl_bits: float | None) -> Comparison:
    sides = [
        ModelPrediction(ModelInfo("Model", "gguf", precision, "cpu", 1), TOKENS, (top,), 1.0)
        for precision, top in (("fp32", PARIS), ("int8", second))
    ]
    return Comparison(sides[0], sides[1], (), kl_bits)


def test_the_finding_of_two_models() -> None:
    same = replace(PARIS, logprob=math.log(0.5))
    assert compare.finding(compared(same, 0.25)) == (
        "Both predict ␣Paris: fp32 with 77.3 %, int8 with 50.0 %; 0.25 bits apart (KL)."
    )
    assert "fp32 predicts ␣Paris (77.3 %), and int8 predicts ␣Rome (60.0 %); 1.5 bits" in compare.finding(
        compared(ROME, 1.5)
    )
    other_id = replace(same, id=1)  # of another vocabulary
    assert compare.finding(compared(other_id, None)) == "Both predict ␣Paris: fp32 with 77.3 %, int8 with 50.0 %."


def test_the_finding_of_an_effect() -> None:
    after = replace(PARIS, logprob=math.log(0.141))
    rome = replace(ROME, logprob=math.log(0.01))
    kept = Effect(("-L23.H4",), ((PARIS, after), (rome, rome)), 1.0)
    assert effect.finding(kept) == "With -L23.H4: ␣Paris falls from 77.3 % to 14.1 %."
    lost = Effect(("-L23.H4",), ((PARIS, after), (rome, ROME)), 1.0)
    assert effect.finding(lost).endswith("to 14.1 %, and ␣Rome leads with 60.0 %.")


# --- Rankings ---------------------------------------------------------------------------------


def ranked(*shares: tuple[str, float, float]) -> Choices:
    return Choices(tuple(Choice(text, (candidate(text, share),), share, length) for text, share, length in shares))


def test_the_finding_of_choices() -> None:
    clear = ranked((" warm", 0.1, 0.1), (" cold", 0.9, 0.9))
    assert choices.finding(clear) == "␣cold leads with 90.0 % of the probability of the 2 choices."
    close = ranked((" a", 0.4, 0.2), (" b", 0.3, 0.5), (" c", 0.3, 0.3))
    assert choices.finding(close).startswith("No choice has half of the probability: ␣a leads with 40.0 %")
    assert choices.finding(close).endswith("Per token, ␣b leads.")


def test_the_finding_of_precisions() -> None:
    def row(name: str, answer: Candidate, bits: float) -> Row:
        return Row(name, Distance(answer, bits / 2, bits, 3, 0))

    alike = Numerics(TOKENS, 0, PARIS, (row("bf16", PARIS, 0.01), row("int8", PARIS, 0.2)))
    sentence = numerics.finding(alike)
    assert "fp32 predicts ␣Paris (77.3 %); so does each other network." in sentence
    assert "largest divergence is that of int8: 0.200 bits after ␣France" in sentence
    other = Numerics(
        TOKENS, 0, PARIS, (row("bf16", PARIS, 0.01), row("int4", ROME, 0.9), Row("int8", None, "Too big."))
    )
    assert "fp32 predicts ␣Paris (77.3 %); int4 predicts ␣Rome. " in numerics.finding(other)
    assert "No other network was compared" in numerics.finding(replace(other, rows=other.rows[2:]))
    assert "All predictions are equal" in numerics.finding(replace(alike, rows=(row("fp16", PARIS, 0.0),)))
