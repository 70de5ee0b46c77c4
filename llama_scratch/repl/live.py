"""Live prediction: what the model says of a line while it is being typed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING

from llama_scratch.repl.session import Session

if TYPE_CHECKING:
    from llama_scratch.microscope.surprisal import Scorer
    from llama_scratch.results import Candidate

# A reading that took longer makes the next one wait as long for the line to rest, up to some seconds.
_QUICK_S, _MAX_DEBOUNCE_S = 0.1, 3.0


@dataclass(frozen=True)
class Reading:
    """What the model says of a line.

    bits: how much each of its characters surprised the model; None where nothing predicted it.
    candidates: what would come next, best first. entropy_bits: how open that is. n_tokens: of the line.
    """

    line: str
    bits: list[float | None]
    candidates: tuple[Candidate, ...]
    entropy_bits: float
    n_tokens: int


def why_not_live(session: Session) -> str:
    """Where the session is that has no live prediction; "" if it can have one."""
    if session.screen.keyboard is None:
        return "in a pipe"
    if session.screen.console.is_dumb_terminal:
        return "on a terminal that cannot show it"
    if session.settings.plain:  # a screen reader would never be silent
        return "with --plain"
    return "in a chat" if session.state.chat else ""  # a message is not a text that the model would continue


def is_live(session: Session) -> bool:
    """Whether the model predicts while a line is typed."""
    return session.settings.live and not why_not_live(session)


class _StaleError(Exception):
    """The line has changed, so its reading is of no use."""


class LivePredictor:
    """A thread that reads the newest line, and nothing else, with the session's engine.

    Each key only costs the tokens that it changed; work on a line that has changed since ends within a piece of
    the network's work. `pause` must come before anybody else uses the engine.

    changed: called from the thread when there is a new `reading`.
    """

    def __init__(self, session: Session, changed: Callable[[], None]):
        self.reading: Reading | None = None
        self._session = session
        self._changed = changed
        self._requested: str | None = None
        self._wake = Event()
        self._busy = False
        self._cost = 0.0  # seconds that the last reading took
        self._scorer: Scorer | None = None
        self._thread = Thread(target=self._run, name="live", daemon=True)

    def request(self, line: str | None) -> None:
        """Read this line from now on, or none; comes back at once."""
        if line is not None and self._thread.ident is None:
            self._thread.start()
        self._requested = line
        self._wake.set()

    def pause(self) -> None:
        """Read nothing; comes back when the engine is free."""
        self._requested = None
        while self._busy:
            time.sleep(0.001)  # which holds no lock that an interrupt could leave held
        if self._scorer and self._scorer.llama is not self._session.llama:
            self._scorer = None  # a model that was replaced is not kept in memory

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            # In this order, so that `pause` sees that the engine is in use, or this that it must not be.
            self._busy = True
            try:
                if (line := self._requested) is not None:
                    self._read(line)
            except _StaleError:
                pass
            except Exception:  # noqa: BLE001 - whatever is wrong with the line, Enter says it
                self.reading = None
                self._changed()
            finally:
                self._busy = False

    def _read(self, line: str) -> None:
        session = self._session
        if not session.state.loading.ended:
            return  # the loop asks again once it is there
        self._wait_for_quiet(line)
        start = time.perf_counter()
        reading = self._score(line)
        self._cost = time.perf_counter() - start
        self._check(line)
        self.reading = reading
        self._changed()

    def _wait_for_quiet(self, line: str) -> None:
        end = time.monotonic() + (min(self._cost, _MAX_DEBOUNCE_S) if self._cost > _QUICK_S else 0)
        while time.monotonic() < end:
            self._check(line)
            time.sleep(0.005)

    def _score(self, line: str) -> Reading:
        # Imported here, because they bring torch.
        from llama_scratch.microscope.surprisal import Scorer, per_character

        llama = self._session.llama
        if self._scorer is None or self._scorer.llama is not llama:
            self._scorer = Scorer(llama)
        scored = self._scorer(
            self._session.encode(line), top=self._session.settings.top, progress=lambda *_: self._check(line)
        )
        return Reading(line, per_character(llama, scored.tokens), scored.next, scored.entropy_bits, len(scored.tokens))

    def _check(self, line: str) -> None:
        if self._requested is not line:
            raise _StaleError
