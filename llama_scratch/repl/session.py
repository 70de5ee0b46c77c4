"""The state of a session: the text so far as exact token ids, what Enter would add to it, and the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from llama_scratch.render import terminal
from llama_scratch.render.progress import progress_bar
from llama_scratch.repl.loading import Loading

if TYPE_CHECKING:
    from llama_scratch.llama import Llama, Prompt
    from llama_scratch.sampling import Sampling


@dataclass
class Settings:
    """What each answer shows: `top` candidates, and `generate` further tokens drawn with `sampling`."""

    top: int
    generate: int
    sampling: Sampling
    plain: bool = False


@dataclass
class Session:
    """Prompts in, answers onto the console. Interrupted at any point it stays as it was before the prompt.

    loading: the model, there already or on its way.
    ids: the tokens of the last prompt with all that was accepted since.
    offered: the tokens that Enter accepts: the predicted one, or all that was generated.
    """

    loading: Loading
    console: Console
    settings: Settings
    ids: list[int] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def llama(self) -> Llama:
        """The model; while it is on its way this waits for it and shows how far it is."""
        if self.loading.ended:
            return self.loading.wait()
        with progress_bar(self.console) as progress:
            return self.loading.wait(progress)

    @property
    def stage(self) -> tuple[str, int, int] | None:
        """What goes on in the background, how much of it is done and how much there is."""
        if not self.loading.ended:
            return self.loading.stage
        return None if self.loading.error else self.loading.wait().preparing

    def ask(self, prompt: Prompt) -> None:
        """Predict what comes after a new prompt and show it."""
        self._answer(prompt, accepted=0)

    def accept(self) -> None:
        """Add what was offered to the text and go on from there; without an offer nothing happens."""
        if self.offered:
            self._answer([*self.ids, *self.offered], accepted=len(self.offered))

    def _answer(self, prompt: Prompt, accepted: int) -> None:
        llama = self.llama
        with progress_bar(self.console) as progress:
            prediction = llama.predict(prompt, top=self.settings.top, progress=progress)
        if accepted:
            self._show_context([token.id for token in prediction.tokens], accepted)
        if self.settings.plain:
            self.console.print(terminal.plain_answer(prediction), markup=False, highlight=False)
        else:
            self.console.print(terminal.answer(prediction))
        # Both at once, so that Ctrl-C never leaves the offer of one text behind another.
        ids, offered = [token.id for token in prediction.tokens], [prediction.next.id]
        self.ids, self.offered = ids, offered
        if self.settings.generate:
            self.offered = self._generate(self.ids) or self.offered

    def _show_context(self, ids: list[int], accepted: int) -> None:
        tokenizer = self.llama.tokenizer
        begin = 1 if ids[0] == tokenizer.bos_id else 0
        text, new = tokenizer.decode(ids[begin:-accepted]), tokenizer.decode(ids[-accepted:])
        self.console.print(terminal.context(text, new, self.console.width))

    def _generate(self, ids: Sequence[int]) -> list[int]:
        """Stream the continuation; Ctrl-C ends it and keeps what came."""
        new = []
        self.console.print(Text(" …", style="dim"), end="")
        try:
            for step in self.llama.continuation(ids, self.settings.generate, self.settings.sampling):
                new.append(step.id)
                self.console.print(Text(terminal.readable(step.text)), end="", soft_wrap=True)
        except KeyboardInterrupt:
            self.console.print(Text("  stopped", style="dim"), end="")
        self.console.print("\n")
        return new

    @property
    def offer_text(self) -> str:
        """What Enter would add, as text."""
        return self.llama.tokenizer.decode(self.offered)
