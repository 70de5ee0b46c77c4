"""A short soak test of the session, and tests that it finds bugs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from llama_scratch.inference.engine import Engine
from llama_scratch.llama import Llama
from llama_scratch.microscope.interventions import ablate
from llama_scratch.microscope.parts import NetworkPart
from llama_scratch.model import KVCache
from llama_scratch.repl.session import Session
from llama_scratch.results import Prediction
from tests.trust.record import read
from tests.trust.soak import BOUNDS, After, FoundError, Soak, Talk, small_model

Line = tuple[str, str, After]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("soak")
    return small_model(folder / "Tiny-Llama-Instruct"), small_model(folder / "Other-Llama-Instruct", seed=1)


@pytest.fixture
def soak(models: tuple[str, str], tmp_path: Path) -> Callable[..., Soak]:
    def start(seed: int = 0, **options: Any) -> Soak:
        return Soak(tmp_path, *models, seed, **({"context": 96, "interactive": False} | options))

    return start


@pytest.mark.parametrize(("interactive", "generate"), [(False, 0), (True, 3)])
def test_a_hundred_and_fifty_commands(soak: Callable[..., Soak], interactive: bool, generate: int) -> None:
    found = soak(11, interactive=interactive, generate=generate)
    found.run(150)
    assert found.compared["answers"] > 120
    assert found.compared["engine"] > 40
    assert len(found.kinds) > 20
    assert found.worst["fp32"] <= BOUNDS["fp32"]


def test_a_fresh_process_says_the_same(soak: Callable[..., Soak]) -> None:
    """A separate process gives the same answer with an intervention."""
    found = soak()
    found.step(("prompt", "the nation", found.says("the nation")))
    part = NetworkPart.named("L1.H1", found.reference.llama(found.state).args)
    line = f"/ablate {part.name}"
    found.step(("ablate", line, found.putting(lambda state: ablate(found.reference.llama(state), part), line)))
    found.process()
    assert found.compared["processes"] == 1


def cancelled(soak: Soak) -> Iterator[tuple[str, list[Line]]]:
    """Name and lines of commands that change several things.

    The last line is the one to cancel.
    """
    path = str(soak.folder / "a.session")
    part = NetworkPart.named("L1.H1", soak.reference.llama(soak.state).args)
    ablated = (
        "ablate",
        "/ablate L1.H1",
        soak.putting(lambda s: ablate(soak.reference.llama(s), part), "/ablate L1.H1"),
    )

    def prompt(text: str) -> Line:
        return "prompt", text, soak.says(text)

    yield "prompt", [prompt("of it")]
    yield "load", [ablated, prompt("x y"), ("load", f"/load {path}", soak.loaded(path))]
    yield "undo", [prompt("of"), ablated, ("undo", "/undo", soak.undone)]
    yield "restore", [ablated, ("restore", "/restore", soak._restored(""))]
    yield "precision", [ablated, ("precision", "/precision fp16", soak.switched(None, "fp16"))]
    yield "model", [ablated, ("model", f"/model {soak.other}", soak.switched(soak.other, None))]
    yield "home", [("model", f"/model {soak.home}", soak.switched(soak.home, None))]
    yield "generate", [prompt("of"), ("generate", "/generate 4", soak.generates(4))]
    yield "on", [("chat", "/chat on", soak.setting(chat=Talk()))]
    yield "chat", [prompt("he")]
    yield "off", [("chat", "/chat off", soak.setting(chat=None))]
    yield "system", [prompt("of"), ("system", "/system hey", soak.setting(chat=Talk("hey"), texts=()))]


@pytest.mark.slow
def test_cancelled_anywhere_a_session_is_as_it_was_or_as_it_shall_be(soak: Callable[..., Soak]) -> None:
    found = soak(interactive=True, generate=2)
    found.step(("prompt", "the nation", found.says("the nation")))
    found.step(("save", f"/save {found.folder}/a.session", found.same))
    for _, (*before, last) in cancelled(found):
        calls = 0
        while calls < 20_000:
            for line in before:
                found.step(line)
            fired = found.kinds["interrupted"]
            found.step(last, interrupt=calls)
            if found.kinds["interrupted"] == fired:  # the command had already ended
                break
            calls += 1 + calls // 2
    assert found.kinds["interrupted"] > 80


@pytest.mark.parametrize("n", [0, 1])
def test_a_load_that_is_cancelled_while_it_answers(
    soak: Callable[..., Soak], monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Regression: the text was lost if the second answer was cancelled.

    The session was replaced in parts, with a second answer in between.
    """
    found = soak()
    found.step(("prompt", "the nation", found.says("the nation")))
    found.step(("save", f"/save {found.folder}/a.session", found.same))
    found.step(("prompt", "x y", found.says("x y")))
    predict, calls = Llama.predict, count()

    def cancelled(llama: Llama, *arguments: Any, **options: Any) -> Prediction:
        if next(calls) == n:
            raise KeyboardInterrupt
        return predict(llama, *arguments, **options)

    monkeypatch.setattr(Llama, "predict", cancelled)
    path = f"{found.folder}/a.session"
    found.step(("load", f"/load {path}", found.loaded(path)))


# --- Planted bugs -----------------------------------------------------------------------------


def broken_rewind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache keeps one token too many."""
    rewind = KVCache.rewind
    monkeypatch.setattr(KVCache, "rewind", lambda cache, length: rewind(cache, min(cache.length, length + 1)))


def forgotten_interventions(monkeypatch: pytest.MonkeyPatch) -> None:
    """/undo does not restore the interventions."""

    def undo(session: Session) -> Any:
        moment = session.state.snapshots[-2]
        session.update(snapshots=session.state.snapshots[:-1])
        return moment

    monkeypatch.setattr("llama_scratch.repl.transitions.undo", undo)


def shared_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is reused for any text of the same length."""
    start = Engine._reset_to
    monkeypatch.setattr(Engine, "_reset_to", lambda engine, ids, length: start(engine, ids, min(1, len(ids) - 1)))


@pytest.mark.parametrize("broken", [broken_rewind, forgotten_interventions, shared_cache])
def test_what_is_wrong_is_found(
    soak: Callable[..., Soak], monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    found = soak(11)
    broken(monkeypatch)
    with pytest.raises(FoundError):
        found.run(300)


def test_record_of_the_long_run() -> None:
    found = read("soak")
    assert found["findings"] == []
    assert found["commands"] >= 10_000
    assert found["compared"]["processes"] >= found["commands"] // 500 - 3
    assert found["worst_relative_difference"]["fp32"] <= found["bounds"]["fp32"] == 1e-5
