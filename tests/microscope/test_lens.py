"""The logit lens against transformers on SmolLM2 and direct sums; /lens."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from llama_scratch.errors import ContextLengthError, UsageError
from llama_scratch.inference import engine as engine_module
from llama_scratch.llama import Llama
from llama_scratch.microscope import lens as lens_module
from llama_scratch.microscope.lens import Guess, Layer, Lens, growing, lens
from llama_scratch.render.page import Finding, Heatmap
from llama_scratch.render.pages import lens as pages
from llama_scratch.repl.commands import run_command
from llama_scratch.repl.growing import growing_view
from llama_scratch.repl.session import Session
from llama_scratch.results import Token
from tests.helpers import smollm2
from tests.helpers.sessions import shown, started

pytestmark = pytest.mark.reference

llama, weights, huggingfaces = smollm2.llama, smollm2.weights, smollm2.huggingfaces
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture
def session(tiny: Llama) -> Session:
    session = started(tiny)
    session.predict("there is the text of it")
    return session


# --- The numbers ------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_layer_says_what_transformers_streams_say(llama: Llama, huggingfaces: Any) -> None:
    """Its hidden states through its norm and head give the same tokens and ranks.

    Probabilities agree within 1e-4. The last of its hidden states is already normed.
    """
    ids = llama.encode(smollm2.TEXTS["prose"])[:16]
    found = lens(llama, ids)
    with torch.inference_mode():
        streams = huggingfaces(torch.tensor([ids]), output_hidden_states=True).hidden_states
        theirs = [huggingfaces.model.norm(stream[0]) for stream in streams[:-1]] + [streams[-1][0]]
        logits = torch.stack([huggingfaces.lm_head(stream) for stream in theirs])  # (n_layers + 1, T, vocab_size)
    answers = logits[-1].argmax(-1)
    own = logits.gather(-1, answers.expand(len(logits), -1)[..., None])
    ranks = (logits > own).sum(-1) + 1
    best = logits.double().log_softmax(-1).max(-1)
    assert [row.layer for row in found.layers] == list(range(-1, 30))
    assert [[guess.id for guess in row.guesses] for row in found.layers] == best.indices.tolist()
    for row, logprobs in zip(found.layers, best.values, strict=True):
        assert [guess.probability for guess in row.guesses] == pytest.approx(logprobs.exp().tolist(), abs=1e-4)
        # Also the distance of a near-certain prediction from 1, which float32 could not represent.
        assert [guess.logprob for guess in row.guesses] == pytest.approx(logprobs.tolist(), rel=1e-2, abs=1e-15)
    # At high ranks, logits are so close that rounding may swap neighbors.
    ours = torch.tensor([[guess.rank_of_answer for guess in row.guesses] for row in found.layers])
    assert ((ours - ranks).abs() <= ranks // 1000).all()


def test_the_last_layer_is_the_models_answer(llama: Llama) -> None:
    ids = llama.encode(PROMPT)
    found, logprobs = lens(llama, ids), llama.logits(ids).double().log_softmax(-1)
    assert [guess.id for guess in found.answers] == logprobs.argmax(-1).tolist()
    assert [guess.logprob for guess in found.answers] == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-5)
    assert [guess.text for guess in found.answers][-1] == " Paris"
    assert all(guess.rank_of_answer == 1 for guess in found.answers)
    assert found.answers[-1].probability == pytest.approx(llama.predict(ids).next.probability, abs=1e-5)
    # The embeddings are tied, so the embedding is most similar to the token itself.
    assert found.layers[0].guesses[-1].text == " is"
    assert json.loads(json.dumps(found.as_json(), allow_nan=False)) == found.as_json()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_probabilities_and_ranks_are_those_of_the_whole_distribution(tiny_dir: Path, precision: str) -> None:
    """Recomputed with a sorted softmax in float64, for every layer and position."""
    llama = Llama.load(tiny_dir, precision=precision, device="cpu")
    ids, model = list(range(60, 75)), llama.engine.model
    streams: list[Tensor] = []
    places = ["embedding", *(f"layers.{layer}.resid_post" for layer in range(3))]
    llama.engine.forward_with_hooks(
        [ids], {place: lambda value, _start: streams.append(value[0].clone()) for place in places}
    )
    found = lens(llama, ids)
    for row, stream in zip(found.layers, streams, strict=True):
        with torch.inference_mode():
            logits = model.output(model.norm(stream)).double()
        order = logits.argsort(dim=-1, descending=True, stable=True)
        for guess, answer, scores, ids_in_order in zip(row.guesses, found.answers, logits, order, strict=True):
            ties = int((scores == scores[answer.id]).sum())  # bfloat16 has few distinct values
            place = ids_in_order.tolist().index(answer.id) + 1
            assert place - ties < guess.rank_of_answer <= place
            assert scores[guess.id] == scores.max()
            assert guess.probability == pytest.approx(float(scores.softmax(-1).max()), abs=1e-6)


def test_windows_and_pieces_change_nothing(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of a long text, in chunks and batches, is that part of the whole."""
    ids = [60 + i % 90 for i in range(40)]
    whole = lens(tiny, ids)
    monkeypatch.setattr(engine_module, "CHUNK", 7)
    monkeypatch.setattr(lens_module, "LENS_POSITIONS", 4)
    for first, count in ((0, 40), (3, 9), (33, 64), (39, 1), (None, 5), (0, 1)):
        found = lens(tiny, ids, first, count)
        begin = 35 if first is None else first
        assert found.first == begin
        assert found.length == 40
        assert [token.id for token in found.tokens] == ids[begin : begin + count]
        for row, expected in zip(found.layers, whole.layers, strict=True):
            same = expected.guesses[begin : begin + count]
            assert [(guess.id, guess.rank_of_answer) for guess in row.guesses] == [
                (guess.id, guess.rank_of_answer) for guess in same
            ]
            assert [guess.logprob for guess in row.guesses] == pytest.approx(
                [guess.logprob for guess in same], abs=1e-4
            )


def test_without_a_window_it_is_the_last_64_positions(tiny: Llama) -> None:
    found = lens(tiny, [60 + i % 90 for i in range(100)])
    assert (found.first, len(found.tokens)) == (36, 64)


def test_positions_in_front_cost_nothing_of_what_comes_later(tiny: Llama) -> None:
    """Tokens after the window do not affect it, and are not computed."""
    lengths: list[int] = []
    with_tap = tiny.intervened({"embedding": lambda value, _start: lengths.append(value.shape[1])})
    lens(with_tap, list(range(60, 160)), 0, 5)
    assert lengths == [5]


def test_layers_come_one_by_one(tiny: Llama) -> None:
    """The last layer comes first, because it has the answers."""
    ids, told = list(range(60, 70)), list[tuple[str, int, int]]()
    steps = list(growing(tiny, ids, progress=lambda *how: told.append(how)))
    assert [[row.layer for row in step.layers] for step in steps] == [[2], [-1, 2], [-1, 0, 2], [-1, 0, 1, 2]]
    assert steps[-1] == lens(tiny, ids)
    assert all(step.answers == steps[-1].answers for step in steps)
    assert [how for how in told if how[0] == "layer"] == [("layer", i, 4) for i in (1, 2, 3)]


def made(*ranks: int) -> Lens:
    """A lens of one position where the answer has these ranks."""
    rows = tuple(Layer(layer, (Guess(rank, str(rank), -1.0, rank),)) for layer, rank in enumerate(ranks, start=-1))
    return Lens((Token(0, "x"),), 0, 1, rows)


@pytest.mark.parametrize(
    ("ranks", "first", "stays"),
    [
        ((9, 5, 1, 1), 1, 1),
        ((1, 1, 1, 1), -1, -1),
        ((9, 8, 2, 1), 2, 2),
        ((1, 5, 1, 1), -1, 1),
        ((9, 1, 2, 1), 0, 2),
        ((1,), -1, -1),
    ],
)
def test_where_the_answer_first_appears_and_where_it_stays(ranks: tuple[int, ...], first: int, stays: int) -> None:
    found = made(*ranks)
    assert (found.first_layer(), found.stays_from()) == (first, stays)
    assert (found.as_json()["first_layer"], found.as_json()["stays_from"]) == (first, stays)


def test_a_changed_network_is_seen_changed(tiny: Llama) -> None:
    """An ablated layer predicts the same as the layer before it.

    The answers are those of the modified network.
    """
    none = {
        f"layers.1.{part}.out": lambda value, _start: torch.zeros_like(value) for part in ("attention", "feed_forward")
    }
    changed, ids = tiny.intervened(none), list(range(60, 72))
    found = lens(changed, ids)
    assert [guess.id for guess in found.layers[2].guesses] == [guess.id for guess in found.layers[1].guesses]
    assert [guess.id for guess in found.answers] == changed.logits(ids).argmax(-1).tolist()
    assert found.answers != lens(tiny, ids).answers


@pytest.mark.parametrize(
    ("ids", "first", "count", "message"),
    [
        ([], None, 64, "The prompt is empty"),
        ([60, 61], 2, 64, "The position in this text must be an integer from 0 to 1, not 2."),
        ([60, 61], -1, 64, "integer from 0 to 1, not -1."),
        ([60, 61], None, 0, "must be at least 1, not 0."),
        ([60, 10**6], None, 64, "1000000 is not a token id"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(
    tiny: Llama, ids: list[int], first: int | None, count: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        lens(tiny, ids, first, count)


def test_a_text_beyond_the_context_is_refused(tiny_dir: Path) -> None:
    with pytest.raises(ContextLengthError):
        lens(Llama.load(tiny_dir, precision="fp32", device="cpu", context=8), list(range(60, 69)))


# --- The page ---------------------------------------------------------------------------------


def table_of(lens: Lens, **how: Any) -> Heatmap:
    (table,) = (part for part in pages.page(lens, **how).parts if isinstance(part, Heatmap))
    return table


def sentence_of(lens: Lens) -> str:
    sentence = pages.page(lens).parts[0]
    assert isinstance(sentence, Finding)
    return sentence.text


def test_the_page_has_every_guess_with_its_probability_and_rank(tiny: Llama) -> None:
    found = lens(tiny, list(range(60, 66)))
    table, ranks = table_of(found), table_of(found, ranks=True)
    assert table.rows == ("L2", "L1", "L0", "embed")
    assert table.columns == tuple(token.text for token in found.tokens)
    assert table.texts is not None
    assert table.hovers is not None
    assert ranks.texts is not None
    assert table.margin is not None
    assert ranks.margin is None
    for r, row in enumerate(reversed(found.layers)):
        for c, guess in enumerate(row.guesses):
            assert (table.values[r][c], table.texts[r][c]) == (guess.probability, guess.text)
            assert ranks.texts[r][c] == str(guess.rank_of_answer)
            assert table.hovers[r][c].endswith(f"rank {guess.rank_of_answer:,}.")
            assert table.mark(r, c) == (c == 5 and guess.rank_of_answer == 1)
        assert table.margin.texts[r] == f"{row.guesses[-1].rank_of_answer:,}"
    assert set(ranks.values[0]) == {1.0}
    worst = min(value for row in ranks.values for value in row if value is not None)
    assert worst == 0


@pytest.mark.parametrize(
    ("rank", "text"), [(7, "7"), (999, "999"), (1000, "1.0k"), (9949, "9.9k"), (9950, "10k"), (128255, "128k")]
)
def test_ranks_stand_in_four_characters(rank: int, text: str) -> None:
    texts = table_of(made(rank, 1), ranks=True).texts
    assert texts is not None
    assert texts[-1][0] == text


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ((9, 5, 1, 1), "leads from layer 1 on. Its rank falls most at layer 1 (5 → 1)."),
        (
            (900, 300, 20, 19, 1),
            "leads from layer 3 on. Its rank falls most at layer 1 (300 → 20) and layer 3 (19 → 1).",
        ),
        (
            (9, 1, 2, 1),
            "leads first after layer 0, and from layer 2 on at every layer. Its rank falls most at layer 0 (9",
        ),
        ((1, 5, 1, 1), "leads first after the embedding, and from layer 1 on at every layer."),
        ((1, 1, 1, 1), "leads from the embedding on."),
    ],
)
def test_the_finding_says_where_the_answer_leads_and_where_its_rank_falls(ranks: tuple[int, ...], words: str) -> None:
    assert sentence_of(made(*ranks)).startswith(f"After x, 1 (36.8 %) {words}")


def test_the_finding_names_no_layer_if_the_rank_never_falls() -> None:
    assert sentence_of(made(1, 1, 1)) == "After x, 1 (36.8 %) leads from the embedding on."


@pytest.mark.slow
def test_the_finding_for_a_known_fact(llama: Llama) -> None:
    """Head L23.H4 moves the answer to the last token, so its rank falls at layer 23."""
    sentence = pages.finding(lens(llama, llama.encode(PROMPT)))
    assert sentence.startswith("After ␣is, ␣Paris (77.3 %) leads from layer 29 on.")
    assert "layer 23 (2,079 → 396)" in sentence


def test_a_long_texts_page_says_which_positions_it_has(tiny: Llama) -> None:
    found = lens(tiny, [60 + i % 90 for i in range(100)])
    assert "Shown: 64 of 100 positions, from 36 on" in " ".join(shown(pages_view(found), 80).split())
    assert table_of(found).window.more == ""
    assert table_of(found, first=40).window.first == 4
    short = lens(tiny, list(range(60, 70)))
    assert table_of(short).window.more.format(3) == "/lens 3"
    assert table_of(short, ranks=True).window.more.format(3) == "/lens ranks 3"
    assert table_of(short).window.first is None
    assert table_of(short, first=4).window.first == 4


def pages_view(lens: Lens) -> Any:
    from llama_scratch.render import to_terminal

    return to_terminal.view(pages.page(lens))


def test_what_is_there_so_far_fits_the_screen(tiny: Llama) -> None:
    """The latest layers, and the progress."""
    steps = list(growing(tiny, list(range(60, 70))))
    page = pages.growing(steps[2], "Layer 2 of 4", 2)
    (table,) = (part for part in page.parts if isinstance(part, Heatmap))
    assert table.rows == ("L2", "L0")
    assert shown(pages_view(steps[-1]), 40)
    assert "Layer 2 of 4 · each layer is an unembedding of every position" in str(page.parts[-1])


# --- /lens ------------------------------------------------------------------------------------


def answered(session: Session, line: str) -> tuple[dict[str, Any], str]:
    """The facts, which are JSON, and the view at 80 columns."""
    reply = run_command(session, line)[1]
    assert reply is not None
    assert reply.view is not None
    return json.loads(json.dumps(reply.facts, allow_nan=False)), shown(reply.view, 80)


def test_the_command_looks_at_the_text_so_far(session: Session) -> None:
    facts, view = answered(session, "/lens")
    assert facts == lens(session.llama, session.ids).as_json()
    assert [token["id"] for token in facts["tokens"]] == session.ids
    assert "Top prediction after each layer" in view
    assert session.state.page is not None
    assert "Rank of the final prediction" in answered(session, "/lens ranks")[1]
    assert answered(session, "/lens ranks 2")[0] == facts
    session.change_settings(plain=True)
    assert "\nAfter layer 1, " in answered(session, "/lens 3")[1]


def test_a_position_is_where_a_narrow_screen_begins(session: Session) -> None:
    answered(session, "/lens 4")
    assert session.state.page is not None
    assert [part.window.first for part in session.state.page.parts if isinstance(part, Heatmap)] == [4]
    session.predict([60 + i % 90 for i in range(100)])
    assert answered(session, "/lens 7")[0]["first"] == 7  # a separate window
    assert len(answered(session, "/lens 7")[0]["tokens"]) == 64
    assert answered(session, "/lens 50")[0]["first"] == 36
    assert answered(session, "/lens 36")[0]["first"] == 36


@pytest.mark.parametrize(
    "argument", ["x", "-1", "1 2", "1.5", "ranks x", "ranks ranks", "2 ranks", "²", "ranks2", "\x1b[31m"]
)
def test_an_argument_that_is_none_gets_a_sentence(session: Session, argument: str) -> None:
    with pytest.raises(UsageError) as raised:
        run_command(session, f"/lens {argument}")
    assert str(raised.value).endswith("for /lens. Give a position such as 0, or ranks, or both.")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("argument", ["99", "999999999", "ranks 99"])
def test_a_position_beyond_the_text_gets_a_sentence(session: Session, argument: str) -> None:
    n = len(session.ids)
    with pytest.raises(UsageError, match=f"position in this text must be an integer from 0 to {n - 1}, not 9+"):
        run_command(session, f"/lens {argument}")


def test_without_a_text_there_is_nothing_to_look_at(tiny: Llama) -> None:
    with pytest.raises(UsageError, match="There is no text yet"):
        run_command(started(tiny), "/lens")


def test_an_interrupt_leaves_the_session_as_it_was(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any unembedding; the next result is correct."""
    before = answered(session, "/lens")[0]
    for stop in range(4):
        calls: list[int] = []
        original = session.llama.engine.model.output.forward

        def output(x: Tensor, calls: list[int] = calls, stop: int = stop, original: Any = original) -> Tensor:
            calls.append(1)
            if len(calls) == stop + 2:  # the first is the forward pass
                raise KeyboardInterrupt
            found: Tensor = original(x)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(session.llama.engine.model.output, "forward", output)
            with pytest.raises(KeyboardInterrupt):
                run_command(session, "/lens")
        assert answered(session, "/lens")[0] == before


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("interactive", "plain", "terminal", "height", "expected"),
    [
        (True, False, True, 24, True),
        (False, False, True, 24, False),
        (True, True, True, 24, False),
        (True, False, False, 24, False),
        (True, False, True, 12, False),
    ],
)
def test_layers_are_shown_as_they_come_where_a_person_watches(
    tiny: Llama, interactive: bool, plain: bool, terminal: bool, height: int, expected: bool
) -> None:
    """And not otherwise; all of it is erased."""
    session = started(tiny)
    file = _Terminal() if terminal else io.StringIO()
    session.screen.console = Console(
        file=file, force_terminal=terminal, width=80, height=height, _environ={"TERM": "xterm"}
    )
    session.screen.interactive = interactive
    session.change_settings(plain=plain)
    with growing_view(session) as (progress, show):
        for found in growing(tiny, list(range(60, 70)), progress=progress):
            show(lambda note, rows, found=found: pages.growing(found, note, rows))  # type: ignore[misc]
    written = file.getvalue()
    assert ("Layer 3 of 4 · each layer" in written) == expected
    if expected:
        assert written.rstrip().endswith("\x1b[2K")  # every line was erased
