"""Live prediction: score a line and predict its next token while the user types."""

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

# If the last reading took longer than _QUICK_S seconds, the next one waits for a pause in typing. The pause must be as
# long as the last reading took, but at most _MAX_DEBOUNCE_S seconds.
_QUICK_S, _MAX_DEBOUNCE_S = 0.1, 3.0


@dataclass(frozen=True)
class Reading:
    """The model's scores for a line.

    Args:
        line: The line.
        bits: Surprisal of each character, see `per_character`. None if nothing precedes its token.
        candidates: The most probable next tokens, best first.
        entropy_bits: Entropy of the next token's distribution.
        n_tokens: Number of tokens in the line.
    """

    line: str
    bits: list[float | None]
    candidates: tuple[Candidate, ...]
    entropy_bits: float
    n_tokens: int


def why_not_live(session: Session) -> str:
    """Return why live prediction is unavailable, such as "in a chat"; "" if available."""
    if session.screen.keyboard is None:
        return "in a pipe"
    if session.screen.console.is_dumb_terminal:
        return "on a terminal that cannot show it"
    if session.settings.plain:  # a screen reader would read every update
        return "with --plain"
    return "in a chat" if session.state.chat else ""  # the model answers a message instead of continuing it


def is_live(session: Session) -> bool:
    """Whether live prediction is on and available."""
    return session.settings.live and not why_not_live(session)


class _StaleError(Exception):
    """The line has changed, so the reading is stale."""


class LivePredictor:
    """A thread that scores the newest line with the session's engine.

    After each keystroke, only the tokens from the first change on are scored. A stale reading is cancelled after the
    current chunk of the forward pass. Call `pause` before another thread uses the engine.

    Args:
        session: The session.
        changed: Called from the live thread when `reading` has changed.
    """

    def __init__(self, session: Session, changed: Callable[[], None]):
        self.reading: Reading | None = None
        self._session = session
        self._changed = changed
        self._requested: str | None = None
        self._wake = Event()
        self._busy = False
        self._cost = 0.0  # duration of the last reading in seconds
        self._scorer: Scorer | None = None
        self._thread = Thread(target=self._run, name="live", daemon=True)

    def request(self, line: str | None) -> None:
        """Request a reading of this line. None cancels the current reading.

        Does not wait for the reading.
        """
        if line is not None and self._thread.ident is None:
            self._thread.start()
        self._requested = line
        self._wake.set()

    def pause(self) -> None:
        """Cancel the current reading and wait until the engine is free."""
        self._requested = None
        while self._busy:
            time.sleep(0.001)  # polling, because an interrupt could leave a lock held
        if self._scorer and self._scorer.llama is not self._session.llama:
            self._scorer = None  # release a replaced model's memory

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            # Set _busy before reading _requested. Then either `pause` sees _busy, or this thread sees the cancellation.
            self._busy = True
            try:
                if (line := self._requested) is not None:
                    self._read(line)
            except _StaleError:
                pass
            except Exception:  # noqa: BLE001 - sending the line will report the error
                self.reading = None
                self._changed()
            finally:
                self._busy = False

    def _read(self, line: str) -> None:
        session = self._session
        if not session.state.loading.ended:
            return  # the editor requests it again once the model is loaded
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
        # Imported here because it imports torch.
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
