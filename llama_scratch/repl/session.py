"""A session: a state that is replaced as a whole, the screen it is shown on, and how to load another model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llama_scratch.errors import UsageError
from llama_scratch.repl.conversation import Chat
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.screen import SessionScreen
from llama_scratch.repl.state import InitialModel, SessionState, Settings, Snapshot, Turn
from llama_scratch.system.progress import Progress

if TYPE_CHECKING:
    from llama_scratch.inference.prompt_text import Prompt
    from llama_scratch.llama import Llama
    from llama_scratch.results import Prediction


class Session:
    """Prompts in, answers onto the console. If it is interrupted at any point, it stays as it was before the prompt.

    `answering` answers lines, `transitions` replaces the state as a whole, `offers` says what Enter would add.

    Args:
        loading: The model, loaded or on its way.
        console: Where the session prints.
        settings: How answers are made and shown.
        open: Loads another model, by its path or name and its precision, with the session's other options.
        interactive: Whether a user watches.
        lists_candidates: Whether a number of candidates was asked for, so that a pipe gets a line for each.
        records_turns: Whether turns and views are remembered for /save and /export.
        debug: Whether an unexpected error ends the session with its traceback.
        chat: The conversation to begin with; None if lines are prompts.
    """

    def __init__(
        self,
        loading: Loading,
        console: Console,
        settings: Settings,
        open: Callable[[str, str, Progress], Llama],
        *,
        interactive: bool = False,
        lists_candidates: bool = False,
        records_turns: bool = True,
        debug: bool = False,
        chat: Chat | None = None,
    ) -> None:
        system = None if chat is None else chat.system
        self.state = SessionState(loading, settings, initial_settings=settings, initial_system=system, chat=chat)
        self.screen = SessionScreen(console, interactive=interactive, records_turns=records_turns)
        self.open = open
        self.lists_candidates = lists_candidates
        self.debug = debug
        self.ended = False

    def update(self, **changes: Any) -> None:
        """Replace fields of the state, all in one assignment."""
        self.state = replace(self.state, **changes)

    def change_settings(self, **changes: Any) -> None:
        """Replace fields of the settings, all in one assignment."""
        self.update(settings=replace(self.settings, **changes))

    def forget(self, **changes: Any) -> None:
        """Begin without a text, and replace further fields of the state in the same step."""
        self.update(snapshots=(), past=(), page=None, **changes)

    @property
    def settings(self) -> Settings:
        """How answers are made and shown."""
        return self.state.settings

    @property
    def llama(self) -> Llama:
        """The model that answers, with the interventions that are on."""
        return self.state.changed or self.intact

    @property
    def intact(self) -> Llama:
        """The model as it was loaded. Waits for it if it is on its way, and shows the progress."""
        loading = self.state.loading
        if loading.ended:
            return loading.wait()
        with self.screen.progress() as progress:
            return loading.wait(progress)

    # --- The text ---

    @property
    def now(self) -> Snapshot | None:
        """The newest text and what comes next; None before the first."""
        return self.state.now

    @property
    def ids(self) -> list[int]:
        """The text so far. Raises `UsageError` if there is none."""
        return self.state.ids

    def encode(self, text: str) -> list[int]:
        """The ids that the model sees for a prompt."""
        return self.llama.encode(text, special=self.settings.special)

    def ids_or_current(self, argument: str) -> list[int]:
        """The ids of the text after a command, or of the text so far if there is no argument."""
        if not argument and self.now is None:
            raise UsageError("There is no text yet; give a prompt first, or give the text after the command.")
        return self.encode(argument) if argument else self.ids

    def text_of(self, ids: Sequence[int]) -> str:
        """Ids as text, without the beginning-of-text token."""
        begin = 1 if ids and ids[0] == self.llama.tokenizer.bos_id else 0
        return self.llama.tokenizer.decode(ids[begin:])

    def predict(self, prompt: Prompt) -> Prediction:
        """Predict the next token of a prompt, which becomes the text."""
        settings = self.settings
        with self.screen.progress() as progress:
            prediction = self.llama.predict(prompt, top=settings.top, special=settings.special, progress=progress)
        snapshot = Snapshot(prediction, (prediction.next.id,), self.state.interventions)
        self.state = self.state.with_text(snapshot)
        return prediction

    def record(self, turn: Turn) -> None:
        """Remember a line and its answer."""
        if self.screen.records_turns:
            if self.state.initial_model is None and self.state.loading.ended:
                self.update(initial_model=InitialModel.of(self.llama))
            self.state.turns.append(turn)
