"""/numerics: divergences against direct sums, and cleanup of opened networks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from torch import Tensor

from llama_scratch.config import RopeScaling
from llama_scratch.errors import OutOfMemoryError, UsageError
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.llama import Llama
from llama_scratch.microscope import numerics as module
from llama_scratch.microscope.numerics import VARIANTS, Numerics, numerics, other_factor
from llama_scratch.render import to_terminal
from llama_scratch.render.pages import numerics as pages
from llama_scratch.repl.commands import completions, run_command
from llama_scratch.system import memory
from llama_scratch.system.progress import Progress
from tests.helpers.checkpoints import tiny_args
from tests.helpers.sessions import assert_sentence, run, shown, started

IDS = [(40 + 37 * i) % 300 for i in range(40)]


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def found(tiny: Llama) -> Numerics:
    return numerics(tiny, IDS, opened(tiny))


def opened(tiny: Llama, closed: list[Llama] | None = None) -> module.Open:
    """Opens the tiny model, and records the networks that were closed."""

    def open(precision: str, progress: Progress) -> Llama:
        llama = Llama.load(tiny.path, precision=precision, device="cpu", progress=progress)
        if closed is not None:
            llama.close = lambda: closed.append(llama)  # type: ignore[method-assign]
        return llama

    return open


def plain_kl(p: Tensor, q: Tensor) -> list[float]:
    """Σ p log2(p/q) after each token, in Python floats."""
    rows = zip(p.double().softmax(-1).tolist(), q.double().softmax(-1).tolist(), strict=True)
    return [sum(a * math.log2(a / b) for a, b in zip(*row, strict=True)) for row in rows]


@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", "RoPE 8"])
def test_distances_are_those_of_whole_logits(tiny: Llama, found: Numerics, name: str) -> None:
    """With each network loaded and run separately."""
    factor = 8.0 if name == "RoPE 8" else None
    other = Llama.load(tiny.path, precision="fp32" if factor else name, device="cpu", rope_factor=factor)
    expected, logits = tiny.logits(IDS), other.logits(IDS)
    kl = plain_kl(expected, logits)
    row = next(row.distance for row in found.rows if row.name == name)
    assert row is not None
    assert row.mean_kl_bits == pytest.approx(sum(kl) / len(kl), rel=1e-3, abs=1e-9)
    assert row.max_kl_bits == pytest.approx(max(kl), rel=1e-3, abs=1e-9)
    assert row.worst == kl.index(max(kl))
    assert row.changed == int((expected.argmax(-1) != logits.argmax(-1)).sum())
    assert row.answer.id == int(logits[-1].argmax())
    assert row.answer.probability == pytest.approx(float(logits[-1].softmax(-1).max()), rel=1e-4)
    assert (row.mean_kl_bits > 0) is (name != "bf16")  # lossless for this file


def test_all_is_there_in_its_order(tiny: Llama, found: Numerics) -> None:
    assert [row.name for row in found.rows] == ["bf16", "fp16", "int8", "RoPE 8"]
    assert found.reference.id == tiny.predict(IDS).next.id
    assert (found.first, found.positions) == (0, 40)
    json.dumps(found.as_json(), allow_nan=False)


def test_the_networks_of_the_session_stay_as_they_are(tiny: Llama) -> None:
    """RoPE frequencies and logits do not change, and opened networks are closed."""
    before, freqs = tiny.logits(IDS), tiny.engine.model.freqs.clone()
    closed: list[Llama] = []
    numerics(tiny, IDS, opened(tiny, closed), ["bf16", "rope", "bf16"])
    assert [llama.info.precision for llama in closed] == ["bf16"]
    assert tiny.engine.model.freqs.equal(freqs)
    assert tiny.logits(IDS).equal(before)


def test_an_interrupt_closes_what_was_opened(tiny: Llama) -> None:
    closed: list[Llama] = []

    def interrupting(stage: str, _done: int, _total: int) -> None:
        if stage == "packing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        numerics(tiny, IDS, opened(tiny, closed), ["int8"], interrupting)
    assert len(closed) == 1


def test_the_session_s_own_precision_is_not_loaded_again(tiny_dir: Path) -> None:
    """Nor closed.

    It is prepared first, so that the named precision answers, and runs without the session's hooks.
    """
    half = Llama.load(tiny_dir, precision="fp16", device="cpu")

    def refuse(precision: str, _progress: Progress) -> Llama:
        raise AssertionError(precision)

    changed = half.intervened({"layers.1.resid_post": lambda x, _start: x * 0})
    closed: list[Llama] = []
    for llama in (half, changed):
        llama.close = lambda llama=llama: closed.append(llama)  # type: ignore[method-assign, misc]
        (row,) = numerics(llama, IDS, refuse, ["fp16"]).rows
        assert row.distance is not None
        assert 0 < row.distance.max_kl_bits < 1e-3
    assert half.preparing is None
    assert not closed


def test_what_does_not_fit_is_a_row(tiny: Llama) -> None:
    """The others are measured anyway."""

    def open(precision: str, progress: Progress) -> LoadedModel:
        if precision == "bf16":
            raise OutOfMemoryError("That needs 99 GB.")
        return opened(tiny)(precision, progress)

    found = numerics(tiny, IDS, open, ["bf16", "fp16"])
    assert [row.error for row in found.rows] == ["That needs 99 GB.", ""]
    assert found.as_json()["rows"][0] == {"name": "bf16", "error": "That needs 99 GB."}
    text = shown(to_terminal.view(pages.page(found)), 80)
    assert "bf16: That needs 99 GB." in text
    assert text.count("\n fp16") == 2


def test_of_a_long_text_the_last_positions_are_compared(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same results as among all of them."""
    whole = numerics(tiny, IDS, opened(tiny), ["bf16"])
    monkeypatch.setattr(module, "_POSITIONS", 5)
    found = numerics(tiny, IDS, opened(tiny), ["bf16"])
    distances = [each.rows[0].distance for each in (whole, found)]
    assert distances[0] is not None
    assert distances[1] is not None
    assert (found.first, found.positions) == (35, 5)
    assert 35 <= distances[1].worst < 40
    assert distances[1].max_kl_bits <= distances[0].max_kl_bits * (1 + 1e-3)
    assert distances[1].answer.id == distances[0].answer.id
    assert "after each of the last 5 of 40 tokens" in shown(to_terminal.view(pages.page(found)), 80)


def test_logits_in_pieces_are_compared_with_their_own(
    tiny: Llama, found: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_scratch.inference.engine._LOGITS_PER_CHUNK", 7)
    (row,) = numerics(tiny, IDS, opened(tiny), ["bf16"]).rows
    assert row.distance is not None
    assert found.rows[0].distance is not None
    assert row.distance.mean_kl_bits == pytest.approx(found.rows[0].distance.mean_kl_bits, rel=0.2)


def test_too_little_memory_for_the_reference_is_said_before_the_work(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: memory.MemoryLimit(1000))
    with pytest.raises(OutOfMemoryError, match="Comparing 40 positions needs") as raised:
        numerics(tiny, IDS, opened(tiny))
    assert_sentence(raised.value)


@pytest.mark.parametrize(("factor", "other"), [(32.0, 8.0), (8.0, 32.0), (1.0, 32.0), (4.0, 32.0)])
def test_the_other_factor(factor: float, other: float) -> None:
    assert other_factor(tiny_args().with_rope_factor(factor)).rope_scaling == RopeScaling(other)


def test_the_command(tiny: Llama) -> None:
    session = started(tiny)
    session.predict(IDS)
    facts = run(session, "/numerics fp16 rope")
    assert [row["name"] for row in facts["rows"]] == ["fp16", "RoPE 8"]
    assert facts["reference"]["answer"]["id"] == facts["rows"][0]["answer"]["id"]
    assert len(session.state.snapshots) == 1
    for argument in ("fp8", "fp32", "rope auto"):
        with pytest.raises(UsageError) as raised:
            run_command(session, f"/numerics {argument}")
        assert_sentence(raised.value)
    assert completions(session, "/numerics fp16 r") == ["/numerics fp16 rope"]
    assert set(completions(session, "/numerics ")) == {f"/numerics {name}" for name in VARIANTS}


def test_changes_that_are_on_are_not_in_it_and_that_is_said(tiny: Llama) -> None:
    session = started(tiny)
    session.predict(IDS)
    intact = run(session, "/numerics rope")
    run_command(session, "/ablate L0.H0 L1")
    changed = run(session, "/numerics rope")
    assert "without" not in intact
    assert changed == intact | {"without": ["-L0.H0", "-L1"]}
    reply = run_command(session, "/numerics rope")[1]
    assert reply is not None
    assert reply.view is not None
    assert "The networks run without the interventions -L0.H0, -L1." in shown(reply.view, 80)


@pytest.mark.parametrize("width", [40, 80])
def test_the_page_fits_its_terminal(found: Numerics, width: int) -> None:
    text = shown(to_terminal.view(pages.page(found)), width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("RoPE 8") == 2
    one = Numerics(found.tokens[:1], 0, found.reference, ())
    assert "Top prediction in each precision" in shown(to_terminal.view(pages.page(one)), width)


def test_progress_is_told(tiny: Llama) -> None:
    """While packing and while reading, so that Ctrl-C is handled."""
    stages: list[str] = []
    numerics(tiny, IDS, opened(tiny), ["int8"], lambda stage, _done, _total: stages.append(stage))
    assert {"reading", "packing"} <= set(stages)
