"""The `Llama` class, with the small random model."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from llama_scratch import ContextLengthError, Llama, LlamaScratchError, ModelNotFoundError, Token, UsageError
from llama_scratch.errors import OutOfMemoryError
from llama_scratch.inference.prompt_warnings import _cut_differently
from llama_scratch.microscope.choices import choices
from llama_scratch.precision.panels import to_panels
from tests.helpers.checkpoints import write_meta


@pytest.fixture(scope="module")
def llama(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32")


def test_a_prediction_is_the_softmax_of_the_last_logits(llama: Llama) -> None:
    prediction = llama.predict("the nation", top=556)
    probabilities = llama.logits("the nation")[-1].double().softmax(-1)
    assert [candidate.id for candidate in prediction.top] == probabilities.argsort(descending=True).tolist()
    for candidate in prediction.top:
        assert candidate.probability == pytest.approx(float(probabilities[candidate.id]), rel=1e-4)
        assert candidate.logprob == pytest.approx(math.log(candidate.probability))
    assert prediction.next == prediction.top[0]
    entropy = -sum(p * math.log2(p) for p in probabilities.tolist())
    assert prediction.entropy_bits == pytest.approx(entropy, rel=1e-4)


def test_a_text_gets_the_beginning_of_text_and_ids_do_not(llama: Llama) -> None:
    ids = llama.tokenizer.encode("the nation")
    assert [token.id for token in llama.predict("the nation").tokens] == [300, *ids]
    assert [token.id for token in llama.predict(ids).tokens] == ids
    assert llama.predict([300, *ids]).next.id == llama.predict("the nation").next.id
    assert llama.predict(ids).prompt == "the nation"


def test_logits_are_float32_after_every_token(llama: Llama) -> None:
    logits = llama.logits([300, 5, 6, 7])
    assert logits.shape == (4, 556)
    assert logits.dtype == torch.float32


def test_generation_is_greedy_prediction_repeated(llama: Llama) -> None:
    ids = llama.encode("the nation")
    for step in llama.generate("the nation", max_new_tokens=12):
        best = llama.predict(ids).next
        assert step.id == best.id
        assert step.logprob == pytest.approx(best.logprob, abs=1e-4)
        ids.append(step.id)


def test_generated_text_in_steps_is_the_text_of_the_ids(llama: Llama) -> None:
    steps = list(llama.generate("the nation", max_new_tokens=60, temperature=2.0, seed=7))
    assert "".join(step.text for step in steps) == llama.tokenizer.decode(step.id for step in steps)


def test_generation_stops_before_a_stop_token(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list(llama.generate("the nation", max_new_tokens=12))
    stop = steps[5].id
    monkeypatch.setattr(llama.tokenizer, "stop_ids", {stop})
    first = [step.id for step in steps].index(stop)
    generated = llama.complete("the nation", 12)
    assert list(generated.ids) == [step.id for step in steps[:first]]
    assert generated.finish_reason == "stop"


def test_generation_ends_where_the_context_is_full(tiny_dir: Path) -> None:
    llama = Llama.load(tiny_dir, context=10)
    generated = llama.complete([300, 5, 6, 7], 50)
    assert len(generated.ids) == 6
    assert generated.finish_reason == "length"
    with pytest.raises(ContextLengthError, match="11 tokens, expected at most 10"):
        llama.generate(list(range(11)))
    with pytest.raises(ContextLengthError):
        llama.predict(list(range(11)))


def test_the_prompt_may_end_in_the_middle_of_a_token(llama: Llama) -> None:
    """Because "th" is a token of the small vocabulary, "t" followed by "h" is tokenized differently."""
    (h,) = llama.tokenizer.encode("h")
    assert _cut_differently(llama.tokenizer, "in t", llama.encode("in t"), Token(h, "h"), special=False)
    (x,) = llama.tokenizer.encode("x")
    assert not _cut_differently(llama.tokenizer, "in t", llama.encode("in t"), Token(x, "x"), special=False)


def test_a_space_at_the_end_is_explained(llama: Llama) -> None:
    assert "ends in a space" in llama.predict("the nation ").warnings[0]
    assert llama.predict(llama.encode("the nation ")).warnings == ()


@pytest.mark.parametrize("prompt", [[], [556], [-1]])
def test_ids_that_are_none_or_unknown_are_refused(llama: Llama, prompt: list[int]) -> None:
    for call in (llama.predict, llama.logits, llama.generate):
        with pytest.raises(UsageError):
            call(prompt)


@pytest.mark.parametrize(
    "prompt",
    [[1.0], [60, 61.5, 62], ["60"], [True], [60, None], [[60]], torch.tensor([60.5]), 60, 1.5, None, b"ab"],
    ids=str,
)
def test_what_is_no_text_and_no_ids_is_a_sentence(llama: Llama, prompt: Any) -> None:
    calls: list[Callable[[Any], object]]
    calls = [
        llama.predict,
        llama.logits,
        llama.generate,
        lambda ids: llama.complete(ids, 3),
        llama.inspect,
        llama.encode,
    ]
    for call in calls:
        with pytest.raises(UsageError) as raised:
            call(prompt)
        message = str(raised.value)
        assert "is not a token id of this model; ids go from 0 to 555." in message or (
            message.startswith("The prompt is ") and message.endswith("expected a text or a sequence of token ids.")
        )


@pytest.mark.parametrize("ids", [[1.0], [60, 61.5, 62], ["60"], [60, "61"], [60, None]], ids=str)
def test_the_engine_takes_whole_numbers_alone(llama: Llama, ids: Any) -> None:
    for call in (
        llama.engine.next_logits,
        llama.engine.all_logits,
        lambda ids: llama.engine.forward_with_hooks([ids], {}),
    ):
        with pytest.raises(UsageError, match=r"Token ids of this model must be integers from 0 to 555\."):
            call(ids)


def test_ids_of_any_whole_type_are_taken(llama: Llama) -> None:
    for prompt in ((60, 61), torch.tensor([60, 61]), np.array([60, 61]), range(60, 62)):
        assert llama.encode(cast(Any, prompt)) == [60, 61]
        assert {type(id) for id in llama.encode(cast(Any, prompt))} == {int}
    assert llama.token(cast(Any, np.int64(60))).id == 60
    for wrong in (60.0, True, "60"):
        with pytest.raises(UsageError, match=r"is not a token id of this model; ids go from 0 to 555\.$"):
            llama.token(cast(Any, wrong))


def test_the_empty_text_is_the_beginning_of_text_alone(llama: Llama) -> None:
    assert [token.text for token in llama.predict("").tokens] == ["<|begin_of_text|>"]


def test_a_vocabulary_smaller_than_top_gives_all_of_it(llama: Llama) -> None:
    assert len(llama.predict("the", top=10_000).top) == 556


def test_the_rope_factor_changes_what_far_positions_see(tiny_dir: Path) -> None:
    ids = [300 + i % 200 for i in range(400)]
    own, same, other = (
        Llama.load(tiny_dir, precision="fp32", rope_factor=factor).logits(ids) for factor in (None, 32.0, 8.0)
    )
    assert torch.equal(own, same)
    assert not torch.allclose(own[-1], other[-1], rtol=1e-3)


def test_another_tokenizer_can_be_named(tiny_dir: Path, tmp_path: Path) -> None:
    directory = write_meta(tmp_path / "model")
    elsewhere = (directory / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    with pytest.raises(ModelNotFoundError, match="`tokenizer`"):
        Llama.load(directory)
    assert Llama.load(directory, tokenizer=elsewhere).predict("the").tokens[1].text == "th"


def test_progress_is_reported_while_loading_and_reading(tiny_dir: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    llama = Llama.load(tiny_dir, progress=lambda *report: seen.append(report))
    assert seen[-1][0] == "checking"
    assert seen[-1][1] == seen[-1][2]
    seen.clear()
    llama.predict([5] * 1200, progress=lambda *report: seen.append(report))
    assert seen == [("reading", 0, 1200), ("reading", 512, 1200)]


def test_threads_are_set(tiny_dir: Path) -> None:
    before = torch.get_num_threads()
    try:
        Llama.load(tiny_dir, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_model_is_named_after_its_directory(tmp_path: Path) -> None:
    assert Llama.load(write_meta(tmp_path / "Llama3.2-1B")).info.name == "Llama3.2-1B"
    assert Llama.load(write_meta(tmp_path / "Llama-3.2-1B" / "original")).info.name == "Llama-3.2-1B"


def test_every_error_is_one_of_ours_with_an_exit_code(tmp_path: Path) -> None:
    with pytest.raises(LlamaScratchError) as caught:
        Llama.load(tmp_path / "nowhere")
    assert caught.value.exit_code == 3


# --- Precision --------------------------------------------------------------------------------


def test_preparing_packs_all_and_says_how_far_it_is(tiny_dir: Path) -> None:
    llama = Llama.load(tiny_dir, precision="int8", device="cpu")
    mapped = llama.weight_bytes
    seen: list[tuple[str, int, int]] = []
    llama.prepare(lambda *report: seen.append(report))
    assert {(stage, total) for stage, _, total in seen} == {("packing", seen[0][2])}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert llama.preparing is None
    assert mapped / 2 < llama.weight_bytes < mapped / 1.8  # 1 byte instead of 2, plus 2 bytes of scale per 32 weights
    assert llama.predict("the nation").model.precision == "int8"


def test_preparing_without_waiting_comes_back_at_once(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(
        "llama_scratch.precision.packing.to_panels", lambda *args: release.wait(10) and to_panels(*args)
    )
    llama = Llama.load(tiny_dir, precision="int8", device="cpu")
    llama.prepare(wait=False)
    assert llama.preparing is not None
    assert llama.preparing[:2] == ("packing", 0)
    release.set()
    llama.prepare()
    assert llama.preparing is None


def test_a_closed_model_answers_on_from_packed_weights_alone(tiny_dir: Path) -> None:
    for prepared in (False, True):
        llama = Llama.load(tiny_dir, precision="int8", device="cpu")
        if prepared:
            llama.prepare()
        llama.close()
        assert llama.preparing is None
        if prepared:
            assert llama.predict("the nation").model.precision == "int8"
            continue
        for _ in range(2):
            with pytest.raises(UsageError, match=r"^The model was closed before its weights were packed\. Load it"):
                llama.predict("the nation")


def test_want_of_memory_while_packing_is_a_sentence(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` and every answer that waits for it raise `OutOfMemoryError`."""

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("llama_scratch.precision.packing.to_panels", fail)
    for prepared in (False, True):
        llama = Llama.load(tiny_dir, precision="int8", device="cpu")
        if prepared:
            with pytest.raises(OutOfMemoryError, match="Tiny-Llama does not fit"):
                llama.prepare()
        for ask in (llama.predict, llama.logits, llama.predict):
            with pytest.raises(OutOfMemoryError, match="Packing the weights does not fit"):
                ask("the nation")
        with pytest.raises(OutOfMemoryError, match="Packing the weights does not fit"):
            next(llama.generate("the nation"))


def test_an_interrupted_wait_for_packed_weights_leaves_the_model_usable(tiny_dir: Path) -> None:
    def interrupt(stage: str, *_: object) -> None:
        assert stage == "packing"
        raise KeyboardInterrupt

    llama = Llama.load(tiny_dir, precision="int8", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        llama.predict("the nation", progress=interrupt)
    other = Llama.load(tiny_dir, precision="int8", device="cpu")
    assert llama.predict("the nation").top == other.predict("the nation").top


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_32_and_16_bits_need_no_preparing(tiny_dir: Path, precision: str) -> None:
    llama = Llama.load(tiny_dir, precision=precision, device="cpu")
    assert llama.engine.packing.done
    assert llama.predict("the nation").model.precision == (precision if precision != "auto" else "bf16")
    llama.prepare()
    assert llama.preparing is None
    assert llama.weight_bytes == (4 if precision == "fp32" else 2) * (llama.info.parameters - 7 * 256)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_generate_what_32_do(tiny_dir: Path, precision: str) -> None:
    """bfloat16 weights convert to float32 without loss."""
    expected = [step.id for step in Llama.load(tiny_dir, precision="fp32").generate("the nation", 12)]
    llama = Llama.load(tiny_dir, precision=precision, device="cpu")
    assert [step.id for step in llama.generate("the nation", 12)] == expected


def test_activations_are_an_option_of_loading(tiny_dir: Path) -> None:
    """The model keeps a value other than the default, for saved sessions."""
    auto, same, rounded = (Llama.load(tiny_dir, activations=name, device="cpu") for name in ("auto", "fp32", "bf16"))
    assert [llama.options["activations"] for llama in (auto, same, rounded)] == [None, "fp32", "bf16"]
    assert auto.info == same.info == rounded.info
    first, second, third = (llama.logits("the nation") for llama in (auto, same, rounded))
    assert torch.equal(first, second)
    assert third.dtype == torch.float32
    assert 1e-4 < float((third - first).norm() / first.norm()) < 0.1


def test_int8_generates_the_same_every_time(tiny_dir: Path) -> None:
    """Also in a second run, with weights from the cache."""
    texts = []
    for _ in range(2):
        llama = Llama.load(tiny_dir, precision="int8", device="cpu")
        texts += [llama.complete("the nation", 12).ids for _ in range(2)]
    assert len(set(texts)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("text", ["x " * 1_500_000, " " * 100_000_000], ids=["many tokens", "many characters"])
def test_a_text_that_is_far_too_long_is_not_tokenized_to_the_end(
    llama: Llama, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For prompts and conversations, and any context."""
    monkeypatch.setattr(llama, "context", 131_072)
    looks: list[Callable[[str], object]] = [
        llama.encode,
        llama.predict,
        llama.logits,
        lambda text: next(llama.generate(text)),
        llama.inspect,
        lambda text: choices(llama, [5], [text]),
        lambda text: llama.inspect("the").attribution(text),
    ]
    for look in looks:
        start = time.process_time()
        with pytest.raises(ContextLengthError, match=f"{len(text):,} characters"):
            look(text)
        assert time.process_time() - start < 2


def test_a_long_text_is_tokenized_to_the_end_if_it_fits(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter text is always tokenized completely, so the error gives its number of tokens."""
    text = "x " * 10_000
    monkeypatch.setattr(llama, "context", 10)
    assert len(llama.encode(text)) == 20_001
    monkeypatch.setattr("llama_scratch.inference.prompt_text._TOKENIZED_IN_FULL", 1_000)
    with pytest.raises(ContextLengthError):
        llama.encode(text)
    monkeypatch.setattr(llama, "context", 20_001)
    assert len(llama.encode(text)) == 20_001
