"""Drafts by prompt lookup, and bit-identical results with and without them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch

from llama_scratch.errors import CheckpointError
from llama_scratch.inference import generation, prompt_lookup
from llama_scratch.inference.engine import _MAX_DRAFT_LENGTH, Engine
from llama_scratch.inference.prompt_lookup import NGramDrafter
from llama_scratch.llama import Llama
from llama_scratch.model import RMSNorm
from llama_scratch.results import Step
from llama_scratch.sampling import GREEDY, Sampling
from llama_scratch.system.jobs import BackgroundJobs
from tests.helpers import KERNELS

CYCLE = [5, 6, 7, 8, 9, 10]
SAMPLED = Sampling(temperature=0.02, top_k=5, seed=3)
MANY = 99


def fed(before: list[int], after: list[int]) -> NGramDrafter:
    """A drafter after a text whose last tokens were added one by one, in one second each."""
    drafts = NGramDrafter()
    drafts.propose(before, MANY)
    for n in range(len(after)):
        drafts.record_cost(0, 0, 1.0)
        drafts.propose([*before, *after[: n + 1]], MANY)
    return drafts


def test_a_draft_is_what_followed_the_last_time() -> None:
    text = [*CYCLE, 1, 2, 3, *CYCLE[:4]]
    assert fed(text[:-4], text[-4:]).propose(text, 2) == CYCLE[4:]


def test_a_draft_goes_round_with_a_text_that_does() -> None:
    drafts = fed(CYCLE, 3 * CYCLE)
    drafts.record_cost(2, 2, 1.1)
    assert drafts.propose(4 * CYCLE, 9) == [*CYCLE, *CYCLE[:3]]


def test_of_two_places_the_one_that_agrees_longer_then_the_newer() -> None:
    """3 4 was first followed by 5, then by 6. 2 3 4 was followed by 5; 9 3 4 never occurred."""
    assert fed([2, 3, 4, 5, 1, 3, 4, 6, 2, 3, 4], [])._source == 3
    assert fed([2, 3, 4, 5, 1, 3, 4, 6, 9, 3, 4], [])._source == 7


def test_no_draft_before_guesses_were_right_nor_where_nothing_stood_before() -> None:
    text = [*CYCLE, 1, 2, 3, *CYCLE[:3]]
    assert fed(text[:-3], text[-3:]).propose(text, 2) == []  # a single guess, which was correct
    assert fed([], list(range(50))).propose(list(range(50)), MANY) == []
    assert NGramDrafter().propose(CYCLE * 3, MANY) == []  # the cost of a pass is not known yet


def test_drafts_grow_while_they_are_right_up_to_the_room() -> None:
    text, at, lengths = CYCLE * 100, 18, []
    drafts = fed(text[:12], text[12:18])
    for _ in range(8):
        draft = drafts.propose(text[:at], _MAX_DRAFT_LENGTH)
        assert draft == text[at : at + len(draft)]
        lengths.append(len(draft))
        at += len(draft) + 1
        drafts.record_cost(len(draft), len(draft), 1.1)
    assert lengths == sorted(lengths)
    assert lengths[-1] == _MAX_DRAFT_LENGTH
    assert len(drafts.propose(text[:at], 4)) == 4
    assert drafts.propose(text[:at], 0) == []


def test_a_wrong_guess_leaves_a_third_and_goes_on_beside_it() -> None:
    """Another word in the same place, as in a table: 300 replaces 5, and the draft continues as after 5."""
    text = 6 * CYCLE
    drafts = fed(text[:12], text[12:])
    for _ in range(8):
        drafts.record_cost(4, 4, 1.0)
    before = drafts.propose(text, MANY)
    after = drafts.propose([*text, 300], MANY)
    assert after[:5] == before[1:6]
    assert 0 < len(after) <= len(before) // 3


def test_what_does_not_pay_ends_and_is_tried_again_later() -> None:
    """If each drafted token costs a full pass and is never accepted, about 1 % of the time is lost."""
    text = CYCLE * 340
    drafts, singles, lost = fed(text[:12], text[12:18]), 0, 0
    for at in range(18, 2018):
        draft = drafts.propose(text[:at], _MAX_DRAFT_LENGTH)  # correct guesses: the streak allows it
        drafts.record_cost(len(draft), 0, 1.0 + len(draft))
        singles += not draft
        lost += len(draft)
    assert 0 < lost <= 2 + prompt_lookup._ALLOWED_LOSS * singles * 1.2


def test_one_delayed_pass_changes_little() -> None:
    drafts = fed(CYCLE, CYCLE)
    drafts.record_cost(0, 0, 1000.0)
    assert drafts._single_s < 1.3


def test_the_last_norm_takes_each_row_by_itself() -> None:
    """Bit-identical for any number of rows, also for sizes that are not a multiple of the vector width."""
    torch.manual_seed(0)
    for dim in (16, 33, 256, 300, 576, 2048, 4096):
        norm, x = RMSNorm(dim, 1e-5), torch.randn(16, dim) * torch.rand(16, 1) * 20
        alone = torch.cat([norm(x[t : t + 1]) for t in range(16)])
        assert all(torch.equal(norm(x[:rows]), alone[:rows]) for rows in range(1, 17))


# --- With the kernels -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["int8", "int4", "bf16", "fp16"])
def loaded(
    built_kernels: None, request: pytest.FixtureRequest, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Llama:
    """A small random network, in panels or in its file's format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_SCRATCH_KERNELS", KERNELS)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        llama = Llama.load(tiny_dir, precision=request.param, device="cpu", context=400)
        llama.prepare()
    return llama


@pytest.fixture
def packed(loaded: Llama, monkeypatch: pytest.MonkeyPatch) -> Llama:
    """The same with kernels, and without stop tokens."""
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", KERNELS)
    monkeypatch.setattr(loaded.tokenizer, "stop_ids", frozenset())
    return loaded


def run(llama: Llama, ids: list[int], count: int, sampling: Sampling, speculate: bool) -> tuple[list[Step], list[int]]:
    """Generate with an empty cache. Returns the steps and the number of tokens in each pass."""
    llama.engine.trim([])
    llama.speculate = speculate
    widths: list[int] = []
    forward = llama.engine._forward_cached

    def counted(ids: Sequence[int], *, all_positions: bool = False) -> torch.Tensor:
        widths.append(len(ids))
        return forward(ids, all_positions=all_positions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama.engine, "_forward_cached", counted)
        return list(llama.continuation(ids, count, sampling)), widths


def keys(llama: Llama) -> list[torch.Tensor]:
    return [part.clone() for layer in range(llama.args.n_layers) for part in llama.engine.cached(layer)]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_generation_is_the_same_to_the_last_bit_and_so_is_the_cache(
    packed: Llama, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Correct and wrong drafts of each length: compare ids, texts, log probabilities and the cache."""
    ids = [*CYCLE, *CYCLE, 40, *CYCLE]
    plain, single = run(packed, ids, 300, sampling, False)
    held, length = keys(packed), packed.engine.cached_tokens
    truth = [*ids, *(step.id for step in plain)]
    turns = iter(range(1000))

    def propose(drafts: NGramDrafter, ids: Sequence[int], room: int) -> list[int]:
        turn = next(turns)
        draft = truth[len(ids) :][: min(room, 1 + turn % _MAX_DRAFT_LENGTH)]
        if turn // _MAX_DRAFT_LENGTH % 2:
            draft[-1] = 1 + draft[-1] % 200
        return draft

    monkeypatch.setattr(NGramDrafter, "propose", propose)
    monkeypatch.setattr(NGramDrafter, "record_cost", lambda *_: None)
    ours, widths = run(packed, ids, 300, sampling, True)
    assert ours == plain
    assert packed.engine.cached_tokens == length
    assert all(torch.equal(a, b) for a, b in zip(keys(packed), held, strict=True))
    assert set(single[1:]) == {1}
    assert len(widths) < len(single) / 2
    assert max(widths[1:]) == 1 + _MAX_DRAFT_LENGTH


def test_it_speculates_by_itself_on_a_text_that_repeats_itself(packed: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer passes with the same logits. The sampler is replaced, because a random network does not repeat text."""
    record_cost, found = NGramDrafter.record_cost, []
    monkeypatch.setattr(
        NGramDrafter, "record_cost", lambda self, drafted, right, _: record_cost(self, drafted, right, 1 + drafted / 10)
    )
    for speculate in (False, True):
        said = iter(CYCLE * 50)
        monkeypatch.setattr(generation, "sample", lambda *_, said=said: next(said))
        found.append(run(packed, CYCLE, 300, GREEDY, speculate))
    (plain, single), (ours, widths) = found
    assert ours == plain
    assert len(single) == 300
    assert len(widths) < 100


def test_an_end_amid_a_draft(packed: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop token leaves the cache as plain decoding does; an abandoned iterator leaves reusable tokens."""
    plain, _ = run(packed, CYCLE, 30, GREEDY, False)
    truth = [*CYCLE, *(step.id for step in plain)]
    monkeypatch.setattr(NGramDrafter, "propose", lambda self, ids, room: truth[len(ids) :][: min(room, 8)])
    monkeypatch.setattr(NGramDrafter, "record_cost", lambda *_: None)
    packed.engine.trim([])
    packed.speculate = True
    steps = cast(Generator[Step, None, None], packed.continuation(CYCLE, 30, GREEDY))
    came = [next(steps) for _ in range(6)]
    steps.close()
    assert came == plain[:6]
    assert list(packed.continuation([*CYCLE, *(step.id for step in came)], 24, GREEDY)) == plain[6:]
    stop = plain[9].id
    first = [step.id for step in plain].index(stop)
    monkeypatch.setattr(packed.tokenizer, "stop_ids", frozenset({stop}))
    stopped, _ = run(packed, CYCLE, 30, GREEDY, True)
    assert [step.id for step in stopped] == [step.id for step in plain[:first]]
    assert packed.engine.cached_tokens == len(CYCLE) + first


def test_a_draft_of_damaged_weights_spoils_no_other_token(packed: Llama) -> None:
    """NaN from a draft does not affect accepted tokens. NaN from the text is an error, as without a draft."""
    engine = packed.engine
    expected = engine.next_logits([*CYCLE, 1]).values
    embedded = engine.model.tok_embeddings.forward

    def damaged(ids: torch.Tensor) -> torch.Tensor:
        return torch.masked_fill(embedded(ids), (ids == 300)[..., None], torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model.tok_embeddings, "forward", damaged)
        engine.trim(CYCLE)
        assert torch.equal(engine.verify([*CYCLE, 1], [2, 300, 3]), expected[None])
        assert engine.cached_tokens == len(CYCLE) + 1
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            engine.verify([*CYCLE, 1, 300], [2])


def test_room_ends_with_the_memory_that_is_taken_and_with_the_context(packed: Llama) -> None:
    engine = Engine(packed.engine.model, 400, packed.engine.packing)  # without allocated memory
    for length, room in ((1, _MAX_DRAFT_LENGTH), (250, 6), (256, 0), (257, _MAX_DRAFT_LENGTH), (395, 5), (400, 0)):
        ids = (CYCLE * 70)[:length]
        engine.next_logits(ids)
        engine.trim(ids[:-1])
        assert engine.max_draft_length(ids) == room


def test_off_where_bits_could_differ(packed: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked weights, interventions, a text other than the cached one, and no kernels."""
    assert packed.path is not None
    engine = packed.engine
    engine.next_logits(CYCLE)
    assert engine.max_draft_length([*CYCLE, 1]) == _MAX_DRAFT_LENGTH
    assert (
        engine.max_draft_length([*CYCLE, 1, 2])
        == engine.max_draft_length([6, *CYCLE[1:], 1])
        == engine.max_draft_length(CYCLE)
        == 0
    )
    changed = packed.intervened({"layers.0.resid_post": lambda value, start: None})
    changed.engine.next_logits(CYCLE)
    assert changed.engine.max_draft_length([*CYCLE, 1]) == 0
    for precision in ("fp32", "bf16", "fp16", "int8"):
        other = Llama.load(packed.path, precision=precision, device="cpu")
        other.engine.next_logits(CYCLE)
        assert other.engine.max_draft_length([*CYCLE, 1]) == _MAX_DRAFT_LENGTH
        other.engine.packing = BackgroundJobs("packing", [(lambda: None, 1)])
        assert other.engine.max_draft_length([*CYCLE, 1]) == 0
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", "0")
    assert engine.max_draft_length([*CYCLE, 1]) == 0
