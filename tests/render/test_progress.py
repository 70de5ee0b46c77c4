"""Progress bars and interrupts: an interrupt while a bar starts or stops leaves no display registered."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.live import Live
from rich.progress import Progress as Bar

from llama_scratch.render.progress import defer_interrupts, live_display
from llama_scratch.repl.interrupts import Interrupts


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    """Install the session's signal handler, and restore the previous one afterwards."""
    before = signal.getsignal(signal.SIGINT)
    yield Interrupts()
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80)


class Interrupted(Bar):
    """A bar that is interrupted in the middle of `start` or `stop`."""

    def __init__(self, console: Console, when: str):
        super().__init__(console=console, transient=True)
        self.when = when

    def start(self) -> None:
        self._maybe("start")
        super().start()
        self._maybe("start")

    def stop(self) -> None:
        self._maybe("stop")
        super().stop()

    def _maybe(self, now: str) -> None:
        if now == self.when:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("when", ["start", "stop"])
def test_an_interrupt_waits_for_a_bars_beginning_and_end(interrupts: Interrupts, console: Console, when: str) -> None:
    """It is raised afterwards, and the next bar is shown."""
    with pytest.raises(KeyboardInterrupt), interrupts.armed(), live_display(Interrupted(console, when)):
        pass
    assert not defer_interrupts.on
    assert not defer_interrupts.waiting
    assert console.set_live(Live(console=console)) is not False  # no other display is registered
    console.clear_live()
    console.file = io.StringIO()
    bar = Bar(console=console, transient=True)
    with live_display(bar):
        bar.add_task("Reading", total=10)
        bar.refresh()
    assert "Reading" in console.file.getvalue()


def test_in_between_it_comes_at_once(interrupts: Interrupts, console: Console) -> None:
    reached = []

    def interrupted() -> None:
        with interrupts.armed(), live_display(Bar(console=console)):
            signal.raise_signal(signal.SIGINT)
            reached.append("the next line")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not reached


def test_at_the_prompt_it_is_nothing(interrupts: Interrupts, console: Console) -> None:
    """If there is nothing to cancel, an interrupt while a bar starts is ignored."""
    with live_display(Interrupted(console, "start")):
        pass
