"""The session: its state, its screen, and a function that loads another model."""

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
    """A session that answers prompts and runs commands.

    If a prediction is interrupted, the session keeps its previous state. Most functions on a session are in other
    modules: `answering` answers lines, `transitions` switches to another model, network or text, and `offers` manages
    the tokens that Enter adds.

    Args:
        loading: The model, loaded or still loading.
        console: The console that the session prints to.
        settings: The settings for computing and showing answers.
        open: Loads another model, given its path or name and its precision, with the session's other options.
        interactive: Whether the session runs on a terminal.
        lists_candidates: Whether the user set the number of candidates. A pipe then gets one line per candidate.
        records_turns: Whether to record turns and views for /save and /export.
        debug: Whether an unexpected error ends the session with a traceback.
        chat: The initial conversation. Without one, lines are prompts.
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
        """Replace fields of the state in one assignment."""
        self.state = replace(self.state, **changes)

    def change_settings(self, **changes: Any) -> None:
        """Replace fields of the settings in one assignment."""
        self.update(settings=replace(self.settings, **changes))

    def forget(self, **changes: Any) -> None:
        """Discard all texts and replace fields of the state in one assignment."""
        self.update(snapshots=(), past=(), page=None, **changes)

    @property
    def settings(self) -> Settings:
        """The settings for computing and showing answers."""
        return self.state.settings

    @property
    def llama(self) -> Llama:
        """The model with the active interventions."""
        return self.state.changed or self.intact

    @property
    def intact(self) -> Llama:
        """The model without interventions; waits for it and shows the progress."""
        loading = self.state.loading
        if loading.ended:
            return loading.wait()
        with self.screen.progress() as progress:
            return loading.wait(progress)

    # --- The text ---

    @property
    def now(self) -> Snapshot | None:
        """The newest text and its prediction, if any."""
        return self.state.now

    @property
    def ids(self) -> list[int]:
        """The token ids of the text so far. Raises `UsageError` before the first text."""
        return self.state.ids

    def encode(self, text: str) -> list[int]:
        """Encode a prompt with the session's setting for special tokens."""
        return self.llama.encode(text, special=self.settings.special)

    def ids_or_current(self, argument: str) -> list[int]:
        """Encode a command's argument.

        Returns:
            The token ids of the argument, or of the text so far if the argument is empty.

        Raises:
            UsageError: If the argument is empty before the first text.
        """
        if not argument and self.now is None:
            raise UsageError("There is no text yet. Enter a prompt first, or give a text after the command.")
        return self.encode(argument) if argument else self.ids

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode ids without the beginning-of-text token."""
        return self.llama.text_of(ids)

    def predict(self, prompt: Prompt) -> Prediction:
        """Predict the next token of a prompt, and make the prompt the session's text."""
        settings = self.settings
        with self.screen.progress() as progress:
            prediction = self.llama.predict(prompt, top=settings.top, special=settings.special, progress=progress)
        snapshot = Snapshot(prediction, (prediction.next.id,), self.state.interventions)
        self.state = self.state.with_text(snapshot)
        return prediction

    def record(self, turn: Turn) -> None:
        """Record a line and its answer, if the session records turns."""
        if self.screen.records_turns:
            if self.state.initial_model is None and self.state.loading.ended:
                self.update(initial_model=InitialModel.of(self.llama))
            self.state.turns.append(turn)
