"""Prefix reuse, chunks and interruptions change the amount of work, but never the result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from llama_scratch.errors import CheckpointError, ContextLengthError, OutOfMemoryError, UsageError
from llama_scratch.inference import engine as engine_module
from llama_scratch.inference.engine import Engine
from llama_scratch.model import KVCache, Transformer
from llama_scratch.system.jobs import BackgroundJobs
from tests.helpers.checkpoints import random_weights, tiny_args

CONTEXT = 400


@pytest.fixture(scope="module")
def network() -> Transformer:
    args = tiny_args()
    # Without tripled q and k, which would amplify rounding from a different chunk size.
    weights = {
        name: weight / 3 if ".wq." in name or ".wk." in name else weight
        for name, weight in random_weights(args).items()
    }
    with torch.device("meta"):
        network = Transformer(args)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


@pytest.fixture
def engine(network: Transformer) -> Engine:
    return Engine(network, CONTEXT)


def ids(length: int, seed: int = 0) -> list[int]:
    """Random ids. A longer sequence with the same seed starts with the shorter one."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(256, (CONTEXT + 1,), generator=generator).tolist()
    return drawn[:length]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def assert_answers(engine: Engine, prompt: Sequence[int], reused: int) -> None:
    """Check the number of reused tokens, and that the logits match a fresh engine."""
    logits = engine.next_logits(prompt)
    assert logits.reused_tokens == reused
    assert logits.values.shape == (engine.model.args.vocab_size,)
    assert logits.values.dtype == torch.float32
    # The reference is a single pass without a cache.
    assert relative(logits.values, engine.model(torch.tensor([list(prompt)]))[0, -1]) <= 1e-5


def test_a_first_prompt_reuses_nothing(engine: Engine) -> None:
    """The logits match a single pass."""
    assert_answers(engine, ids(50), 0)


def test_the_same_prompt_again_reuses_all_but_its_last_token(engine: Engine) -> None:
    """The last token is computed again, because logits are not cached."""
    for reused in (0, 49, 49):
        assert_answers(engine, ids(50), reused)


def test_another_last_word_reuses_all_before_it(engine: Engine) -> None:
    """Reuse is exact to the token: 49 of 50 tokens, or 47 if the last three differ."""
    engine.next_logits(ids(50))
    assert_answers(engine, [*ids(49), 300], 49)
    assert_answers(engine, [*ids(47), 300, 301], 47)


def test_an_edit_in_the_middle_reuses_what_is_before_it(engine: Engine) -> None:
    """The tokens after the edit have the same ids, but a different context."""
    engine.next_logits(ids(50))
    edited = [*ids(20), 300, *ids(50)[21:]]
    assert_answers(engine, edited, 20)
    assert_answers(engine, ids(50), 20)


def test_a_shorter_prompt_reuses_its_own_length_less_one(engine: Engine) -> None:
    """The cache is rewound, and the rest of the longer prompt is removed."""
    engine.next_logits(ids(50))
    assert_answers(engine, ids(30), 29)
    assert_answers(engine, ids(50), 30)


def test_a_prompt_of_one_token_reuses_nothing(engine: Engine) -> None:
    """Even if the same prompt is repeated."""
    for _ in range(2):
        assert_answers(engine, ids(1), 0)


def test_generation_computes_one_token_a_step_and_the_next_prompt_reuses_it(engine: Engine) -> None:
    """Decode greedily, then repeat the prompt with a suffix that starts like the continuation."""
    prompt = ids(50)
    sequence = prompt
    for step in range(10):
        logits = engine.next_logits(sequence)
        assert logits.reused_tokens == (0 if step == 0 else len(sequence) - 1)
        sequence = [*sequence, int(logits.values.argmax())]
    assert_answers(engine, [*sequence[:55], 300], 55)
    assert_answers(engine, prompt, 49)


def test_logits_of_every_position_are_those_of_one_pass(engine: Engine) -> None:
    """With any cache contents; the next prompt reuses the tokens."""
    engine.next_logits(ids(30))
    every = engine.all_logits(ids(50))
    assert every.shape == (50, engine.model.args.vocab_size)
    assert relative(every, engine.model(torch.tensor([ids(50)]), all_positions=True)[0]) <= 1e-5
    assert_answers(engine, [*ids(50), 300], 50)


@pytest.mark.parametrize("chunk", [1, 7, 16, 50, 51, 512])
def test_pieces_of_any_size_give_the_same(engine: Engine, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Including prompts of whole chunks, and a reused prefix that ends within a chunk."""
    monkeypatch.setattr(engine_module, "CHUNK", chunk)
    assert_answers(engine, ids(50), 0)
    assert_answers(engine, [*ids(33), *ids(48, seed=1)], 33)
    assert relative(engine.all_logits(ids(50)), engine.model(torch.tensor([ids(50)]), all_positions=True)[0]) <= 1e-5


def test_a_long_prompt_goes_through_in_pieces(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass is longer than a chunk, and the total is the number of tokens that were not reused."""
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    lengths: list[int] = []
    with engine.model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1])):
        engine.next_logits(ids(50))
        engine.next_logits([*ids(20), *ids(40, seed=1)])
    assert lengths == [16, 16, 16, 2, 16, 16, 8]


def test_progress_counts_the_tokens_that_are_not_reused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is reported before each chunk except the last."""
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    told: list[tuple[str, int, int]] = []
    for prompt in (ids(50), [*ids(20), *ids(40, seed=1)], ids(10)):
        engine.next_logits(prompt, progress=lambda *report: told.append(report))
    assert told == [("reading", done, 50) for done in (0, 16, 32)] + [("reading", done, 40) for done in (0, 16)]


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("piece", range(4))
def test_an_interruption_anywhere_leaves_every_answer_right(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, piece: int, layer: int
) -> None:
    """Interrupt a chunk and layer of the second prompt; then repeat the first and the second, and a third."""
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    first, second = ids(50), [*ids(20), *ids(60, seed=1)]
    engine.next_logits(first)
    passes = 0

    def interrupt(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes > piece:
            raise KeyboardInterrupt

    with engine.model.layers[layer].register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        engine.next_logits(second)
    done = 20 + 16 * piece  # chunks before the interrupted one are kept
    assert_answers(engine, second, done)
    with engine.model.layers[layer].register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        engine.next_logits(ids(70, seed=2))
    assert_answers(engine, [*first, *first], 0)
    assert_answers(engine, [*first[:49], *second], 49)


@pytest.mark.parametrize("rewound", [False, True], ids=["before", "after"])
def test_an_interruption_at_the_rewind_leaves_every_answer_right(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, rewound: bool
) -> None:
    """The engine's ids must always be those of the cached prompt."""
    first, second = ids(50), [*ids(20), *ids(60, seed=1)]
    engine.next_logits(first)
    rewind = KVCache.rewind

    def interrupt(cache: KVCache, length: int) -> None:
        if rewound:
            rewind(cache, length)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "rewind", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.next_logits(second)
    assert_answers(engine, second, 20)
    assert_answers(engine, first, 20)


def test_an_interruption_in_all_positions_leaves_every_answer_right(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then, two chunks of 16 tokens are complete, and they are reused."""
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    passes = 0

    def interrupt(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise KeyboardInterrupt

    engine.next_logits(ids(50))
    with engine.model.layers[1].register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        engine.all_logits(ids(60, seed=1))
    assert_answers(engine, [*ids(40, seed=1), 300], 32)


def test_a_prompt_as_long_as_the_context_is_answered_and_a_longer_one_refused(engine: Engine) -> None:
    """The error is raised before any computation, so the cached tokens are still reused."""
    assert_answers(engine, ids(CONTEXT), 0)
    for ask in (engine.next_logits, engine.all_logits):
        with pytest.raises(ContextLengthError, match=f"{CONTEXT + 1} tokens, expected at most {CONTEXT}"):
            ask(ids(CONTEXT + 1))
    assert_answers(engine, ids(CONTEXT), CONTEXT - 1)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [([], "The prompt is empty"), ([1, -1, 2], "-1 is not a token id"), ([1, 556], "556 is not a token id")],
)
def test_a_prompt_that_is_none_is_refused(engine: Engine, prompt: list[int], says: str) -> None:
    """The cache is unchanged."""
    engine.next_logits(ids(50))
    for ask in (engine.next_logits, engine.all_logits):
        with pytest.raises(UsageError, match=says):
            ask(prompt)
    assert_answers(engine, ids(50), 49)


def test_the_first_and_the_last_id_are_answered(engine: Engine) -> None:
    """Valid ids are 0 to vocab_size − 1."""
    assert_answers(engine, [0, 555], 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layers.1.feed_forward.w2.weight", "norm.weight", "tok_embeddings.weight"])
def test_damaged_weights_are_an_error_and_not_an_answer(name: str, value: float) -> None:
    """A single NaN spreads to all results."""
    args = tiny_args()
    weights = random_weights(args, tied=False)
    weights[name].view(-1)[7] = value
    network = Transformer(args)
    network.load_state_dict(weights)
    for ask in (Engine(network, CONTEXT).next_logits, Engine(network, CONTEXT).all_logits):
        with pytest.raises(CheckpointError, match="NaN or infinity, so its weights are damaged"):
            ask([0, 1, 2])


# --- Waiting for packed weights ---------------------------------------------------------------


def packing(*jobs: Callable[[], object]) -> BackgroundJobs:
    """Background jobs of equal size."""
    return BackgroundJobs("packing", [(job, 1) for job in jobs])


ASKS: list[Callable[[Engine], object]] = [
    lambda engine: engine.next_logits(ids(5)),
    lambda engine: engine.all_logits(ids(5)),
    lambda engine: engine.forward_with_hooks([ids(5)], {}),
]


@pytest.mark.parametrize("ask", ASKS, ids=["next_logits", "all_logits", "run"])
def test_the_first_answer_waits_until_the_weights_are_packed(
    network: Transformer, ask: Callable[[Engine], object]
) -> None:
    """For every kind of request, no layer runs before the last job has ended."""
    done: list[str] = []

    def job() -> None:
        time.sleep(0.02)
        done.append("job")

    jobs = packing(job, job, job)
    engine = Engine(network, CONTEXT, jobs)
    assert not jobs.started
    with network.layers[0].register_forward_hook(lambda *_: done.append("layer")):
        ask(engine)
        ask(engine)
    assert done[:4] == ["job", "job", "job", "layer"]
    assert jobs.done


def test_an_answer_that_waits_says_how_far_the_packing_is(network: Transformer) -> None:
    """Progress counts jobs; the next answer does not wait."""
    engine = Engine(network, CONTEXT, packing(*[lambda: time.sleep(0.05)] * 3))
    told: list[tuple[str, int, int]] = []
    engine.next_logits(ids(5), progress=lambda *report: told.append(report))
    assert told == sorted(told)
    assert {(stage, total) for stage, _, total in told} == {("packing", 3)}
    assert {done for _, done, _ in told} >= {0, 1, 2}
    told.clear()
    engine.next_logits(ids(6), progress=lambda *report: told.append(report))
    assert not told


def test_what_is_no_part_of_the_weights_is_not_waited_for(network: Transformer) -> None:
    """Jobs of size 0 do not delay answers, such as the compilation, which only affects speed."""
    release = threading.Event()
    jobs = BackgroundJobs("packing", [(lambda: release.wait(10), 0)])
    engine = Engine(network, CONTEXT, jobs)
    engine.next_logits(ids(5))
    assert not jobs.started
    jobs.start()
    assert jobs.running
    assert_answers(engine, ids(5), 4)
    release.set()
    jobs.wait()


def test_an_interrupted_wait_holds_nothing_back(network: Transformer) -> None:
    """Packing continues in the background, and the next answer waits for the rest of it."""
    release = threading.Event()
    done: list[int] = []
    engine = Engine(network, CONTEXT, packing(lambda: release.wait(10), lambda: done.append(1)))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.next_logits(ids(5), interrupt)
        assert not done
    release.set()
    assert_answers(engine, ids(5), 0)
    assert done == [1]


@pytest.mark.parametrize("ask", ASKS, ids=["next_logits", "all_logits", "run"])
@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (MemoryError(), OutOfMemoryError, "Packing the weights does not fit"),
        (CheckpointError("The file changed."), CheckpointError, "The file changed"),
    ],
)
def test_an_error_of_the_packing_is_that_of_each_answer(
    network: Transformer, ask: Callable[[Engine], object], error: Exception, expected: type[Exception], says: str
) -> None:
    """No answer is computed with partially packed weights."""

    def fail() -> None:
        raise error

    engine = Engine(network, CONTEXT, packing(lambda: None, fail, lambda: None))
    for _ in range(3):
        with pytest.raises(expected, match=says):
            ask(engine)


def test_packing_that_was_closed_is_an_error_and_not_other_weights_answer(network: Transformer) -> None:
    """If packing was complete before that, answers still work."""
    closed, whole = packing(lambda: None), packing(lambda: None)
    whole.wait()
    for jobs in (closed, whole):
        jobs.close()
    for _ in range(2):
        with pytest.raises(UsageError, match="closed before its weights were packed"):
            Engine(network, CONTEXT, closed).next_logits(ids(5))
    assert_answers(Engine(network, CONTEXT, whole), ids(5), 0)


def test_reuse_goes_through_all_that_was_asked(engine: Engine) -> None:
    """A prompt, its continuation, an edit in the middle, the truncated first prompt, and all of them again."""
    prompt = ids(50)
    generated = prompt
    for _ in range(6):
        generated = [*generated, int(engine.next_logits(generated).values.argmax())]
    assert_answers(engine, generated, 55)
    edited = [*generated[:40], 300, *generated[41:]]
    assert_answers(engine, edited, 40)
    assert_answers(engine, edited[:45], 44)
    assert_answers(engine, [*edited[:45], 301], 45)
    assert_answers(engine, generated, 40)
    assert_answers(engine, generated[:3], 2)
    assert_answers(engine, generated, 3)
