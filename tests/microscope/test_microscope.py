"""Predictions under the microscope, against transformers and direct sums."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_scratch.errors import ContextLengthError, OutOfMemoryError, UsageError
from llama_scratch.inference import engine as engine_module
from llama_scratch.inference.loaded_model import entropy_bits
from llama_scratch.llama import Llama
from llama_scratch.microscope import diff as diff_module
from llama_scratch.microscope import distributions
from llama_scratch.microscope.choices import choices
from llama_scratch.microscope.compare import compare
from llama_scratch.microscope.diff import diff
from llama_scratch.microscope.distributions import jensen_shannon_bits, kl_bits
from llama_scratch.microscope.surprisal import Scored, Scorer, Surprisal, per_character, surprisal
from llama_scratch.microscope.tokens import tokens
from llama_scratch.microscope.tree import Branch, tree, walk
from llama_scratch.results import Candidate, JsonResult, to_json
from llama_scratch.system import memory
from tests.helpers import smollm2
from tests.helpers.checkpoints import write_meta
from tests.helpers.sessions import assert_sentence

pytestmark = pytest.mark.reference

# SmolLM2 in fp32, and transformers with the same weights: they share only the file.
llama, weights, huggingfaces = smollm2.llama, smollm2.weights, smollm2.huggingfaces
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def witness(tiny_dir: Path) -> Llama:
    """The same model with a different cache."""
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


def logprobs_of(huggingfaces: Any, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of transformers, (T, vocab_size) float64, in one pass."""
    with torch.inference_mode():
        logits: Tensor = huggingfaces(torch.tensor([list(ids)])).logits[0]
    return logits.double().log_softmax(-1)


def along(logprobs: Tensor, ids: Sequence[int]) -> list[float]:
    """The log-probability of each token except the first."""
    return [float(logprobs[i, id]) for i, id in enumerate(ids[1:])]


@contextmanager
def counted(llama: Llama) -> Iterator[list[int]]:
    """Record the number of positions in each run of the network."""
    runs: list[int] = []
    handle = llama.engine.model.register_forward_pre_hook(lambda _model, args: runs.append(args[0].shape[1]))
    try:
        yield runs
    finally:
        handle.remove()


def assert_json(found: Any) -> None:
    """Check that the result is strict JSON."""
    assert json.loads(json.dumps(found.as_json(), allow_nan=False)) == found.as_json()


# --- Distributions ----------------------------------------------------------------------------

logit_pairs = st.integers(2, 6).flatmap(
    lambda n: st.tuples(*[st.lists(st.floats(-50, 50), min_size=n, max_size=n).map(torch.tensor)] * 2)
)


def plain_entropy(p: Sequence[float]) -> float:
    return -sum(x * math.log2(x) for x in p if x > 0)


@given(logit_pairs)
def test_divergences_are_those_of_the_textbook(pair: tuple[Tensor, Tensor]) -> None:
    """Bounds, symmetry, and JSD = H(mean) - mean of H, KL = Σ p log p/q."""
    p, q = (logits.double().log_softmax(-1) for logits in pair)
    a, b = p.exp().tolist(), q.exp().tolist()
    jsd, kl = float(jensen_shannon_bits(p, q)), float(kl_bits(p, q))
    assert 0 <= jsd <= 1
    assert jsd == float(jensen_shannon_bits(q, p))
    mean = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    assert jsd == pytest.approx(plain_entropy(mean) - (plain_entropy(a) + plain_entropy(b)) / 2, abs=1e-9)
    assert kl == pytest.approx(sum(x * math.log2(x / y) for x, y in zip(a, b, strict=True) if x > 0), abs=1e-9)
    assert kl >= 0
    assert kl_bits(p, p) == 0
    assert float(jensen_shannon_bits(p, p)) == pytest.approx(0, abs=1e-12)
    assert float(entropy_bits(p)) == pytest.approx(plain_entropy(a), abs=1e-9)


def test_predictions_with_nothing_in_common_are_one_bit_apart() -> None:
    """And never more: with six tokens, rounding alone would give 1.0000000000000004."""
    for n in range(1, 12):
        p = torch.tensor([0.0] * n + [-1000.0] * n).double().log_softmax(-1)
        assert 1 - 1e-12 < float(jensen_shannon_bits(p, p.flip(0))) <= 1


# --- Tokens -----------------------------------------------------------------------------------


def test_tokens_have_their_bytes(llama: Llama) -> None:
    """Also if a character is split: the bytes add up to the text's."""
    text = "Hi 東京🙂"
    found = tokens(llama, text)
    assert b"".join(piece.bytes for piece in found.tokens) == text.encode()
    assert [piece.id for piece in found.tokens] == llama.encode(text)
    assert any("\\x" in piece.text for piece in found.tokens)
    assert found.as_json()["tokens"][0] == {"id": found.tokens[0].id, "text": "Hi", "bytes": "4869"}
    assert_json(found)


# --- Surprisal --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("text", smollm2.TEXTS.values(), ids=smollm2.TEXTS)
def test_surprisal_is_that_of_one_pass_of_transformers(llama: Llama, huggingfaces: Any, text: str) -> None:
    ids = llama.encode(text)
    found, theirs = surprisal(llama, text), logprobs_of(huggingfaces, ids)
    expected = along(theirs, ids)
    assert [token.id for token in found.tokens] == ids
    assert [token.logprob for token in found.tokens[1:]] == pytest.approx(expected, abs=1e-4)
    for token, row in zip(found.tokens[1:], theirs, strict=False):
        assert token.rank is not None
        # Others may be so close that rounding decides.
        assert int((row > row[token.id] + 1e-3).sum()) < token.rank <= int((row > row[token.id] - 1e-3).sum()) + 1
    entropies = [plain_entropy(row.exp().tolist()) for row in theirs[:4]]
    assert [token.entropy_bits for token in found.tokens[1:5]] == pytest.approx(entropies, abs=1e-3)
    assert found.entropy_bits == pytest.approx(plain_entropy(theirs[-1].exp().tolist()), abs=1e-3)
    assert [candidate.id for candidate in found.next] == theirs[-1].topk(5).indices.tolist()
    assert found.bits == pytest.approx(-sum(expected) / math.log(2), abs=1e-2)
    assert found.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)


def test_a_token_s_numbers_belong_together(llama: Llama) -> None:
    """␣Paris is the top candidate, and its bits match its probability."""
    paris = surprisal(llama, PROMPT + " Paris").tokens[-1]
    best = llama.predict(PROMPT).next
    assert (paris.text, paris.rank) == (" Paris", 1)
    assert paris.probability == pytest.approx(best.probability, abs=1e-5)
    assert paris.bits == pytest.approx(-math.log2(best.probability), abs=1e-4)
    assert_json(surprisal(llama, PROMPT))


def test_nothing_predicts_a_first_token(llama: Llama) -> None:
    """It has no score, and a text of one token has no perplexity."""
    found = surprisal(llama, "Hello", top=3)
    assert [(t.logprob, t.rank, t.bits, t.probability, t.entropy_bits) for t in found.tokens] == [(None,) * 5]
    assert (found.bits, found.perplexity) == (0, None)
    assert [c.id for c in found.next] == [c.id for c in llama.predict("Hello", top=3).top]
    assert_json(found)


def test_a_perplexity_beyond_all_floats_is_none() -> None:
    """Random weights can be that certain of another token."""
    first, second = Scored(0, "a", None, None, None), Scored(1, "b", -1e5, 9, 0.0)
    assert Surprisal((first, second), (), 0.0).perplexity is None


# An edit: where the text is cut, the new tokens, and the progress call that interrupts it, if any.
edits = st.lists(
    st.tuples(st.integers(0, 40), st.lists(st.integers(0, 299), max_size=25), st.none() | st.integers(1, 12)),
    min_size=1,
    max_size=6,
)


class CancelledError(Exception):
    """Raised by a progress callback in these tests."""


def interrupting(at: int | None) -> Callable[[str, int, int], None]:
    """A progress callback that raises on its `at`-th call."""
    calls = 0

    def progress(_stage: str, _done: int, _total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise CancelledError

    return progress


def assert_same_scores(found: Surprisal, expected: Surprisal) -> None:
    """Equal up to the rounding of different chunks."""
    assert [token.id for token in found.tokens] == [token.id for token in expected.tokens]
    for token, other in zip(found.tokens, expected.tokens, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=2e-3)
        assert token.entropy_bits == pytest.approx(other.entropy_bits, abs=2e-3)
    assert found.next[0].logprob == pytest.approx(expected.next[0].logprob, abs=2e-3)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits)
def test_a_scorer_says_after_any_edits_what_a_fresh_one_says(tiny: Llama, witness: Llama, steps: Any) -> None:
    """After any removals, additions and cancellations. Small chunks give many of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_LOGITS_PER_CHUNK", 4)
        patch.setattr(distributions, "_POSITIONS", 3)
        scorer = Scorer(tiny)
        ids = [65]
        for cut, new, interrupted_at in steps:
            ids = [*ids[: max(1, cut)], *new]
            try:
                found = scorer(ids, progress=interrupting(interrupted_at))
            except CancelledError:
                continue
            assert_same_scores(found, surprisal(witness, ids))
        assert_same_scores(scorer(ids), surprisal(witness, ids))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits)
def test_a_scorer_computes_what_is_new_and_one_token_more(tiny: Llama, steps: Any) -> None:
    """The token before the first new one, because the prediction after it is not kept."""
    scorer, ids = Scorer(tiny), [65]
    before: list[int] = []
    for cut, new, _ in steps:
        ids = [*ids[: max(1, cut)], *new]
        limit = min(len(before), len(ids))
        shared = next((i for i in range(limit) if before[i] != ids[i]), limit)
        with counted(tiny) as runs:
            scorer(ids)
        assert sum(runs) == len(ids) - max(0, shared - 1)
        before = ids


def test_a_cancelled_scorer_goes_on_where_it_was(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens scored before the interruption are not scored again."""
    monkeypatch.setattr(engine_module, "_LOGITS_PER_CHUNK", 10)
    scorer, ids = Scorer(tiny), list(range(100, 150))
    with pytest.raises(CancelledError):
        scorer(ids, progress=interrupting(4))
    with counted(tiny) as runs:
        scorer(ids)
    assert sum(runs) == 50 - 30


def test_a_scorer_survives_that_others_use_the_engine(tiny: Llama, witness: Llama) -> None:
    """It keeps its own scores; the cache only saves time."""
    scorer, ids = Scorer(tiny), list(range(60, 90))
    scorer(ids)
    tiny.predict([1, 2, 3])
    assert_same_scores(scorer([*ids, 5, 6]), surprisal(witness, [*ids, 5, 6]))


@pytest.mark.parametrize(
    ("ids", "top", "error"),
    [([], 5, UsageError), ([10**6], 5, UsageError), ([1], 0, UsageError), ([1] * 200_000, 5, ContextLengthError)],
)
def test_what_cannot_be_scored_is_a_sentence(tiny: Llama, ids: list[int], top: int, error: type[UsageError]) -> None:
    with pytest.raises(error) as raised:
        surprisal(tiny, ids, top)
    assert_sentence(raised.value)


def scored(ids: Sequence[int], tiny: Llama, first: float | None = -1.0) -> list[Scored]:
    """Tokens with (i + 1) · ln 2 nats each: 1, 2, 3, … bits."""
    found = [Scored(id, tiny.token(id).text, -(i + 1) * math.log(2), 1, 0.0) for i, id in enumerate(ids)]
    return [Scored(ids[0], "", None, None, None), *found[1:]] if first is None else found


@given(text=st.text(min_size=1))
def test_each_character_gets_the_bits_of_its_tokens(tiny_tokens: Llama, text: str) -> None:
    """By byte offsets: a character made of three tokens has their sum."""
    text = text.encode("utf-8", "replace").decode()
    ids = tiny_tokens.tokenizer.encode(text)
    owner = [i for i, id in enumerate(ids) for _ in tiny_tokens.tokenizer.token_bytes(id)]
    expected, at = [], 0
    for char in text:
        expected.append(sum(i + 1 for i in set(owner[at : at + len(char.encode())])))
        at += len(char.encode())
    assert per_character(tiny_tokens, scored(ids, tiny_tokens)) == pytest.approx(expected)


@given(ids=st.lists(st.integers(0, 310), min_size=1))
@example(ids=[237, 160])  # the first bytes of a surrogate
@example(ids=[237, 160, 65])
@example(ids=[237, 160, 176, 128])
@example(ids=[237, 160, 226, 130])
def test_characters_are_those_of_the_decoded_text(tiny_tokens: Llama, ids: list[int]) -> None:
    """With any bytes: invalid ones are one U+FFFD, or as many as the decoder returns."""
    assert len(per_character(tiny_tokens, scored(ids, tiny_tokens))) == len(
        tiny_tokens.tokenizer.decode(ids[1:] if ids[0] == tiny_tokens.tokenizer.bos_id else ids)
    )


@pytest.fixture(scope="session")
def tiny_tokens(tiny_dir: Path) -> Llama:
    """A model of which these tests use only the tokenizer."""
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


def test_a_character_that_nothing_predicted_has_no_bits(tiny: Llama) -> None:
    """Nor has one that begins with such a token. BOS is not a character."""
    bytes_of_euro = list("€a".encode())
    assert per_character(tiny, scored(bytes_of_euro, tiny, first=None)) == pytest.approx([None, 4])
    bos = tiny.tokenizer.bos_id
    assert bos is not None
    assert per_character(tiny, scored([bos, 97], tiny, first=None)) == pytest.approx([2])
    assert per_character(tiny, []) == []


# --- Tree -------------------------------------------------------------------------------------


def leaves(branches: Sequence[Branch], path: tuple[Branch, ...] = ()) -> Iterator[tuple[Branch, ...]]:
    """Each path to a leaf of the tree."""
    for branch in branches:
        here = (*path, branch)
        yield from leaves(branch.children, here) if branch.children else [here]


@pytest.mark.slow
def test_a_tree_s_paths_have_the_probabilities_of_one_pass(llama: Llama, huggingfaces: Any) -> None:
    """Each path, summed up by transformers; and its probabilities multiply."""
    ids = llama.encode(PROMPT)
    found = tree(llama, PROMPT, width=3, depth=3)
    paths = list(leaves(found.branches))
    assert len(paths) == 27
    for path in paths:
        whole = [*ids, *(branch.id for branch in path)]
        assert path[-1].path_probability == pytest.approx(math.prod(branch.probability for branch in path), rel=1e-9)
    for path in paths[::4]:
        whole = [*ids, *(branch.id for branch in path)]
        theirs = logprobs_of(huggingfaces, whole)
        assert path[-1].path_logprob == pytest.approx(sum(along(theirs, whole)[-3:]), abs=1e-3)
        for i, branch in enumerate(path[:-1], start=len(ids)):
            assert [child.id for child in branch.children] == theirs[i].topk(3).indices.tolist()
    assert_json(found)


def test_a_tree_and_choices_say_the_same(llama: Llama) -> None:
    branch = tree(llama, PROMPT, width=2, depth=2).branches[0].children[0]
    ids = [*llama.encode(PROMPT), tree(llama, PROMPT, 1, 1).branches[0].id]
    following = choices(llama, ids, [branch.text]).choices[0]
    assert following.logprob == pytest.approx(branch.logprob, abs=1e-5)


def test_each_prediction_of_a_tree_costs_one_token(tiny: Llama) -> None:
    """The rest is cached, because the tree grows depth first."""
    tiny.predict([250])
    with counted(tiny) as runs:
        tree(tiny, [1, 2, 3, 4, 5], width=3, depth=4)
    assert sum(runs) == 5 + 3 + 9 + 27


def test_a_tree_ends_at_a_stop_token(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a leaf, and paths cannot pass it. The other branches continue."""
    best = tree(tiny, [7, 8], width=2, depth=1).branches[0].id
    monkeypatch.setattr(tiny.tokenizer, "stop_ids", frozenset({best}))
    first, second = tree(tiny, [7, 8], width=2, depth=2).branches
    assert (first.stop, first.children) == (True, ())
    assert not second.stop
    assert len(second.children) == 2
    assert walk(tiny, [7, 8], [1]) == [7, 8, best]
    with pytest.raises(UsageError, match="the text ends at 1") as raised:
        walk(tiny, [7, 8], [1, 2])
    # A text that ends with a stop token can be continued like any other prompt.
    assert len(walk(tiny, [7, 8, best], [2])) == 4
    assert_sentence(raised.value)


def test_a_tree_ends_where_the_context_does(tiny_dir: Path) -> None:
    llama = Llama.load(tiny_dir, precision="fp32", device="cpu", context=4)
    assert all(len(path) == 2 for path in leaves(tree(llama, [1, 2, 3], width=2, depth=4).branches))


def test_walking_leads_to_the_branch_of_that_number(tiny: Llama) -> None:
    found = tree(tiny, [1, 2, 3], width=3, depth=2)
    branch = found.branches[2].children[1]
    assert walk(tiny, [1, 2, 3], [3, 2]) == [1, 2, 3, found.branches[2].id, branch.id]


@pytest.mark.parametrize(("width", "depth"), [(0, 3), (11, 1), (3, 0), (1, 7), (10, 4), (4, 6)])
def test_a_tree_that_is_too_large_is_refused(tiny: Llama, width: int, depth: int) -> None:
    with pytest.raises(UsageError, match=f"{width}x{depth}") as raised:
        tree(tiny, [1], width, depth)
    assert_sentence(raised.value)


@pytest.mark.parametrize("path", [[0], [11], [1, 0], [1] * 7])
def test_there_is_no_such_branch(tiny: Llama, path: list[int]) -> None:
    with pytest.raises(UsageError, match="does not exist") as raised:
        walk(tiny, [1], path)
    assert_sentence(raised.value)


# --- Choices ----------------------------------------------------------------------------------


def test_choices_have_the_probabilities_of_one_pass(llama: Llama, huggingfaces: Any) -> None:
    """For one token and several. Shares are a softmax of the sums and of the means."""
    ids = llama.encode("The opposite of hot is")
    texts = [" cold", " freezing cold weather", " Xylophone", "\n"]
    found = choices(llama, ids, texts)
    sums, means = [], []
    for text, choice in zip(texts, found.choices, strict=True):
        new = llama.tokenizer.encode(text)
        logprobs = along(logprobs_of(huggingfaces, [*ids, *new]), [*ids, *new])[-len(new) :]
        assert (choice.text, [token.id for token in choice.tokens]) == (text, new)
        assert [token.logprob for token in choice.tokens] == pytest.approx(logprobs, abs=1e-4)
        sums.append(sum(logprobs))
        means.append(sum(logprobs) / len(logprobs))
    assert [choice.logprob for choice in found.choices] == pytest.approx(sums, abs=1e-3)
    assert [choice.probability for choice in found.choices] == pytest.approx([math.exp(s) for s in sums], rel=1e-3)
    for shares, values in (("normalized", sums), ("by_length", means)):
        expected = [math.exp(value) / sum(map(math.exp, values)) for value in values]
        assert [getattr(choice, shares) for choice in found.choices] == pytest.approx(expected, rel=1e-3)
    assert found.ranked[0].text == " cold"
    assert [c.logprob for c in found.ranked] == sorted((c.logprob for c in found.choices), reverse=True)
    assert found.probability == pytest.approx(sum(map(math.exp, sums)), rel=1e-3)
    assert_json(found)


def test_a_choice_that_begins_with_another_adds_nothing_to_their_probability(llama: Llama) -> None:
    """It is a special case of the other choice. Duplicates do not count twice either."""
    ids = llama.encode("The opposite of hot is")
    found = choices(llama, ids, [" cold weather", " cold", " cold", " cool"])
    assert found.probability == pytest.approx(found.choices[1].probability + found.choices[3].probability)


def test_choices_compute_the_prompt_once(tiny: Llama) -> None:
    """And for each choice all tokens but its last."""
    tiny.predict([250])
    with counted(tiny) as runs:
        choices(tiny, [1, 2, 3, 4, 5, 6], ["a", "zqx"])
    assert sum(runs) == 6 + 3


@pytest.mark.parametrize(("ids", "texts"), [([1], ["a", ""]), ([], ["a", "b"]), ([-1], ["a"])])
def test_choices_that_cannot_be_meant_are_a_sentence(tiny: Llama, ids: list[int], texts: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        choices(tiny, ids, texts)
    assert_sentence(raised.value)


# --- Diff -------------------------------------------------------------------------------------


def divergence(p: Tensor, q: Tensor) -> float:
    """Jensen–Shannon divergence of two rows of log-probabilities, by entropies."""
    a, b = p.exp().numpy(), q.exp().numpy()
    return plain_entropy(((a + b) / 2).tolist()) - (plain_entropy(a.tolist()) + plain_entropy(b.tolist())) / 2


def test_a_diff_has_the_divergences_of_two_passes(llama: Llama, huggingfaces: Any) -> None:
    first = llama.encode("The capital of France, she said, is")
    second = llama.encode("The capital of all Germany, she said, is")
    found = diff(llama, first, second)
    ours, theirs = logprobs_of(huggingfaces, first), logprobs_of(huggingfaces, second)
    behind = [pair for pair in found.pairs if pair.first >= found.shared]
    assert found.shared == 3
    assert [pair.token.text for pair in behind] == [",", " she", " said", ",", " is"]
    for pair in found.pairs:
        assert first[pair.first] == second[pair.second] == pair.token.id
        assert pair.jsd_bits == pytest.approx(divergence(ours[pair.first], theirs[pair.second]), abs=1e-4)
        assert pair.first_next.id == int(ours[pair.first].argmax())
        assert pair.second_next.id == int(theirs[pair.second].argmax())
    assert [pair.jsd_bits for pair in found.pairs[:3]] == [0, 0, 0]
    assert all(pair.jsd_bits > 1e-3 for pair in behind)
    parting = next(i for i, pair in enumerate(found.pairs) if pair.first_next.id != pair.second_next.id)
    assert found.parting is found.pairs[parting]
    assert [c.id for c in found.first_top] == ours[-1].topk(5).indices.tolist()
    assert [c.id for c in found.second_top] == theirs[-1].topk(5).indices.tolist()
    assert found.jsd_bits == found.pairs[-1].jsd_bits
    assert_json(found)


def test_a_diff_is_symmetric(tiny: Llama) -> None:
    first, second = [1, 2, 3, 4, 5, 6], [1, 2, 9, 9, 5, 6]
    there, back = diff(tiny, first, second), diff(tiny, second, first)
    assert [pair.jsd_bits for pair in there.pairs] == pytest.approx([pair.jsd_bits for pair in back.pairs], abs=1e-6)
    assert there.jsd_bits == pytest.approx(back.jsd_bits, abs=1e-6)
    assert there.first_top[0].id == back.second_top[0].id


def test_equal_texts_do_not_differ(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by rounding, because the divergence is not computed."""
    monkeypatch.setattr(diff_module, "jensen_shannon_bits", lambda _p, _q: 1e-16)
    found = diff(tiny, [1, 2, 3], [1, 2, 3])
    assert [pair.jsd_bits for pair in found.pairs] == [0, 0, 0]
    assert (found.jsd_bits, found.parting, found.first_top) == (0, None, found.second_top)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_text_and_its_beginning(tiny: Llama, swapped: bool) -> None:
    """The shorter one ends within the common prefix. Each has its own prediction."""
    texts = ([1, 2, 3, 4, 5], [1, 2, 3])
    first, second = reversed(texts) if swapped else texts
    found = diff(tiny, first, second)
    assert (found.shared, len(found.pairs)) == (3, 3)
    for ids, top in ((first, found.first_top), (second, found.second_top)):
        expected = tiny.predict(ids).top
        assert [c.id for c in top] == [c.id for c in expected]
        assert top[0].logprob == pytest.approx(expected[0].logprob, abs=1e-4)
    p, q = (tiny.logits(ids)[-1].double().log_softmax(-1) for ids in (first, second))
    assert found.jsd_bits == pytest.approx(divergence(p, q), abs=1e-4)


def test_what_texts_share_at_the_beginning_is_aligned_and_computed_once(tiny: Llama) -> None:
    """Although the longest common substring is elsewhere in the first text."""
    first, second = [1, 2, 9, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5]
    tiny.predict([250])
    with counted(tiny) as runs:
        found = diff(tiny, first, second)
    assert sum(runs) == len(first) + len(second) - 2
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 0), (1, 1), (5, 2), (6, 3), (7, 4)]


def test_texts_without_anything_in_common(tiny: Llama) -> None:
    found = diff(tiny, [1, 2], [3, 4, 5])
    assert (found.shared, found.pairs, found.parting) == (0, (), None)
    assert found.jsd_bits > 0
    assert_json(found)


def test_a_diff_that_does_not_fit_is_refused(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed."""
    monkeypatch.setattr(memory, "memory_limit", lambda: memory.MemoryLimit(4 * tiny.args.vocab_size * 3 - 1))
    with counted(tiny) as runs, pytest.raises(OutOfMemoryError, match="Comparing texts of 3 and 4 tokens") as raised:
        diff(tiny, [1, 2, 3], [9, 1, 2, 3])
    assert runs == []
    assert_sentence(raised.value)


def test_what_cannot_be_compared_is_a_sentence(tiny: Llama) -> None:
    for pair in (([], [1]), ([1], []), ([1], [10**6])):
        with pytest.raises(UsageError) as raised:
            diff(tiny, *pair)
        assert_sentence(raised.value)


# --- Compare ----------------------------------------------------------------------------------


def test_a_model_does_not_differ_from_itself(llama: Llama) -> None:
    found = compare(llama, llama, llama.encode(PROMPT))
    assert found.kl_bits == pytest.approx(0, abs=1e-6)
    assert [c.id for c in found.first.top] == [c.id for c in found.second.top]
    assert [token.text for token in found.tokens] == [candidate.text for candidate in found.first.top]
    for token in found.tokens:
        assert token.first is not None
        assert token.second is not None
        assert token.first.logprob == pytest.approx(token.second.logprob, abs=1e-4)
    assert_json(found)


@pytest.mark.slow
def test_two_precisions_are_as_far_apart_as_their_logits(llama: Llama, smollm2_path: Path) -> None:
    """Each candidate has both probabilities, and each prediction names its precision."""
    other = Llama.load(smollm2_path, precision="int8", device="cpu")
    other.prepare()
    ids = llama.encode("A long time ago there was a")
    found = compare(llama, other, ids, top=4)
    p, q = (model.logits(ids)[-1].double().log_softmax(-1) for model in (llama, other))
    expected = sum(a * (math.log2(a) - math.log2(b)) for a, b in zip(p.exp().tolist(), q.exp().tolist(), strict=True))
    assert found.kl_bits == pytest.approx(expected, rel=1e-2)
    assert found.kl_bits is not None
    assert 0 < found.kl_bits < 0.1
    assert (found.first.model.precision, found.second.model.precision) == ("fp32", "int8")
    for token in found.tokens:
        assert token.first is not None
        assert token.second is not None
        assert token.first.id == token.second.id
        assert token.first.logprob == pytest.approx(float(p[token.first.id]), abs=1e-4)
        assert token.second.logprob == pytest.approx(float(q[token.second.id]), abs=1e-2)
    assert {c.id for c in (*found.first.top, *found.second.top)} == {t.first.id for t in found.tokens if t.first}
    assert found.first.entropy_bits == pytest.approx(plain_entropy(p.exp().tolist()), abs=1e-3)


def test_models_of_one_vocabulary_get_the_same_ids(tiny: Llama, tmp_path: Path) -> None:
    """Also ids that the tokenizer would not produce."""
    other = Llama.load(write_meta(tmp_path / "Other", seed=1), precision="fp32", device="cpu")
    ids = list(b"the rest")
    assert tiny.tokenizer.encode("the rest") != ids
    found = compare(tiny, other, ids)
    assert [token.id for token in found.second.tokens] == ids
    p, q = (model.logits(ids)[-1].double().log_softmax(-1).tolist() for model in (tiny, other))
    there = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)) / math.log(2)
    back = sum(math.exp(b) * (b - a) for a, b in zip(p, q, strict=True)) / math.log(2)
    assert abs(there - back) > 0.1
    assert found.kl_bits == pytest.approx(there, rel=1e-3)


def test_a_model_that_was_not_prepared_is_compared_as_it_is_named(tiny: Llama, tiny_dir: Path) -> None:
    """The comparison waits until its weights are packed."""
    other = Llama.load(tiny_dir, precision="int8", device="cpu")
    found = compare(tiny, other, tiny.encode("the rest"))
    assert found.second.model.precision == "int8"
    assert found.kl_bits is not None
    assert 1e-6 < found.kl_bits < 0.1


def test_models_with_other_vocabularies_are_compared_by_text(llama: Llama, tiny: Llama) -> None:
    """Each tokenizes the text itself.

    A token of only one vocabulary has no probability in the other.
    """
    text = "the rest"
    found = compare(llama, tiny, llama.encode(text), top=300)
    assert found.kl_bits is None
    assert [token.id for token in found.second.tokens] == tiny.encode(text)
    q = tiny.logits(text)[-1].double().log_softmax(-1)
    both = [token for token in found.tokens if token.first and token.second]
    assert len(both) >= 10
    for token in both:
        assert token.first is not None
        assert token.second is not None
        assert llama.tokenizer.token_bytes(token.first.id) == tiny.tokenizer.token_bytes(token.second.id)
        assert token.second.logprob == pytest.approx(float(q[token.second.id]), abs=1e-4)
    assert any(token.second is None for token in found.tokens)
    assert any(token.first is None for token in found.tokens)
    assert len(found.tokens) == len({(t.first and t.first.id, t.second and t.second.id) for t in found.tokens})
    back = compare(tiny, llama, tiny.encode(text))
    assert [token.id for token in back.second.tokens] == llama.encode(text)
    assert_json(found)


def test_a_comparison_without_candidates_is_refused(tiny: Llama) -> None:
    with pytest.raises(UsageError) as raised:
        compare(tiny, tiny, [1], top=0)
    assert_sentence(raised.value)


def test_a_result_as_json() -> None:
    """Fields in order, or the listed attributes, with nested values of every kind."""

    @dataclass(frozen=True)
    class Inner:
        a: int
        b: bytes

    @dataclass(frozen=True)
    class Outer(JsonResult):
        json_fields = ("inner as nested", "twice")
        inner: tuple[Inner, ...]

        @property
        def twice(self) -> dict[str, tuple[int, ...]]:
            return {"n": (2 * len(self.inner),)}

    result = Outer((Inner(1, b"\x00\xff"),))
    assert result.as_json() == to_json(result) == {"nested": [{"a": 1, "b": "00ff"}], "twice": {"n": [2]}}
    assert list(to_json(Candidate(1, "x", 0.0))) == ["id", "text", "probability", "logprob"]
    assert to_json(None) is None
