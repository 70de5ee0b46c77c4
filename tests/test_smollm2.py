"""Trained weights and real text: SmolLM2 in this package and in two independent implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.llama import Llama
from llama_scratch.precision.lazy_weight import as_tensor
from llama_scratch.system.progress import silent
from tests.helpers import reference, smollm2
from tests.helpers.smollm2 import SHAPE, TEXTS

pytestmark = pytest.mark.reference

llama, weights, huggingfaces = smollm2.llama, smollm2.weights, smollm2.huggingfaces


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Check for logits within 1e-4 relative L2, and the same five candidates in the same order after every token.

    The six best logits differ by at least 4e-4 in these texts, and rounding changes a logit by less than 1.2e-4.
    """
    assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) <= 1e-4
    assert torch.equal(ours.topk(5).indices, theirs.topk(5).indices)


def test_the_texts_are_long_enough_to_matter(llama: Llama) -> None:
    """About 560 tokens in total."""
    assert sum(len(llama.encode(text)) for text in TEXTS.values()) >= 500


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_real_text_gets_the_logits_of_transformers(llama: Llama, huggingfaces: Any, text: str) -> None:
    """With the same dequantized weights and our token ids."""
    ids = llama.encode(text)
    assert_same(llama.logits(text), huggingfaces(torch.tensor([ids])).logits[0])


def test_real_text_gets_the_logits_of_the_reference(llama: Llama, weights: dict[str, Tensor]) -> None:
    """In float64, for a short text."""
    text = "The opposite of hot is cold, and 2 + 2 = 4. Она сказала: «да»."
    assert_same(llama.logits(text), reference.forward(weights, SHAPE, llama.encode(text)).logits)


def test_the_weights_are_those_that_the_gguf_package_reads(smollm2_path: Path, weights: dict[str, Tensor]) -> None:
    """Bit-identical weights under the same names."""
    ours = open_checkpoint(smollm2_path).load(silent)
    assert ours.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(as_tensor(ours[name]), weight), name


def test_the_shape_is_the_published_one(llama: Llama) -> None:
    """Each field as read from the file."""
    args = llama.args
    assert {name: getattr(args, name) for name in SHAPE if name != "rope_factor"} == pytest.approx(
        {name: value for name, value in SHAPE.items() if name != "rope_factor"}
    )
    assert (args.dim, args.ffn_dim, args.vocab_size, args.max_seq_len) == (576, 1536, 49_152, 8192)
    assert args.rope_scaling is None
    assert llama.info.parameters == args.n_parameters(tied=True) == 134_515_008


@pytest.mark.parametrize(
    ("prompt", "text", "probability"),
    [
        ("The capital of France is", " Paris", 0.773),
        ("The opposite of hot is", " cold", 0.684),
        ("2 + 2 =", " ", 0.863),
    ],
)
def test_known_prompts_get_their_known_answer(llama: Llama, prompt: str, text: str, probability: float) -> None:
    """Three decimals of the probability through the public API."""
    prediction = llama.predict(prompt)
    assert prediction.next.text == text
    assert round(prediction.next.probability, 3) == probability


def test_the_second_best_is_known_too(llama: Llama) -> None:
    """Candidates are sorted, best first."""
    second = llama.predict("The capital of France is").top[1]
    assert second.text == " the"
    assert round(second.probability, 3) == 0.065


@pytest.fixture(scope="module", params=["fp16", "int8"])
def packed(request: pytest.FixtureRequest, smollm2_path: Path) -> Llama:
    llama = Llama.load(smollm2_path, precision=request.param, device="cpu")
    llama.prepare()
    return llama


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the second from the first after each token, in nats."""
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.slow
def test_packed_weights_keep_their_promise_on_real_text(llama: Llama, packed: Llama) -> None:
    """fp16 logits are within 1e-3 of fp32; int8 has almost the same distribution despite real outliers."""
    ours, theirs = packed.logits(TEXTS["facts"]), llama.logits(TEXTS["facts"])
    relative = float((ours - theirs).norm() / theirs.norm())
    kl = float(divergence(ours, theirs).mean())
    if packed.info.precision == "fp16":
        assert relative <= 1e-3
        assert kl <= 1e-5
    else:
        assert relative <= 0.05
        assert kl <= 1e-2
    assert packed.predict("The capital of France is").next.text == " Paris"
    assert packed.predict("The capital of France is").model.precision == packed.info.precision


@pytest.mark.slow
def test_the_first_answer_of_real_weights_is_in_8_bits(llama: Llama, smollm2_path: Path) -> None:
    """The first answer waits for packing and agrees with the next one."""
    other = Llama.load(smollm2_path, precision="int8", device="cpu")
    first, again = (other.predict("The capital of France is") for _ in range(2))
    assert first.model.precision == "int8"
    expected = llama.predict("The capital of France is").next
    assert first.next.id == expected.id
    assert 1e-4 < abs(first.next.logprob - expected.logprob) < 0.1
    assert first.next.logprob == pytest.approx(again.next.logprob, abs=1e-2)  # in a batch of rows, and alone
