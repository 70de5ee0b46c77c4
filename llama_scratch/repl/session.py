"""The state of a session: the texts so far as exact token ids, what Enter would add, and the settings."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, RenderableType
from rich.text import Text

from llama_scratch.errors import ContextLengthError, UsageError, sanitize
from llama_scratch.render import answer, text
from llama_scratch.render.progress import progress_bar
from llama_scratch.render.text import Wrapped, readable
from llama_scratch.repl.conversation import ANSWER, Chat
from llama_scratch.repl.loading import Loading
from llama_scratch.results import ENDS_IN_A_WORD, ENDS_IN_SPACE, Generated, as_json
from llama_scratch.sampling import Sampling
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import replace_surrogates

if TYPE_CHECKING:
    from llama_scratch.inference.prompt_text import Prompt
    from llama_scratch.llama import Llama
    from llama_scratch.microscope.effect import Effect
    from llama_scratch.microscope.interventions import Intervention
    from llama_scratch.render.page import Page
    from llama_scratch.repl.keyboard import Keyboard
    from llama_scratch.results import ModelInfo, Prediction, Step


# What `Console.print` does not add to a text.
_AS_IT_IS: dict[str, Any] = {"sep": "", "end": "", "soft_wrap": True}
# Texts that /undo can go back to.
_MOMENTS = 1000


@dataclass
class Settings:
    """What each answer shows, and how.

    top: candidates. generate: further tokens behind each answer, drawn with `sampling`. plain: sentences in place
    of tables and bars. live: predict while the person types. special: `<|eot_id|>` and the like in a prompt are
    the special tokens of that name.
    """

    top: int
    generate: int
    sampling: Sampling
    plain: bool = False
    live: bool = True
    special: bool = False

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UsageError(f"{sanitize(self.top)} candidates were asked for, expected at least 1 (--top).")
        if self.generate < 0:
            raise UsageError(
                f"{sanitize(self.generate)} tokens to generate were asked for, expected at least 0 (--generate)."
            )


@dataclass(frozen=True)
class Snapshot:
    """A text and what comes next: the prediction after it, and the tokens that Enter would add to it.

    interventions: those that were on, so that /undo goes back to the network that gave the answer.
    """

    prediction: Prediction
    offered: tuple[int, ...]
    interventions: tuple[Intervention, ...] = ()

    @property
    def prompt(self) -> str:
        """The text as it was typed, or the decoded tokens."""
        return self.prediction.prompt

    @property
    def top(self) -> int:
        """The number of candidates in the answer."""
        return len(self.prediction.top)

    @property
    def ids(self) -> list[int]:
        """The text's tokens, the beginning-of-text token included."""
        return [token.id for token in self.prediction.tokens]


@dataclass(frozen=True)
class Past:
    """A text of a loaded session that /undo can go back to. It is answered only then, with `top` candidates.

    offered: As in `Snapshot`; None for the predicted token.
    """

    ids: list[int]
    prompt: str
    top: int
    offered: tuple[int, ...] | None
    interventions: tuple[Intervention, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One line that was typed, and the object that answered it."""

    input: str
    output: dict[str, Any]


@dataclass(frozen=True)
class InitialModel:
    """The model that a session began with. It stays known after another model has taken its place.

    rope_factor: The factor in use, 1 if RoPE is not scaled.
    options: See `Llama.options`.
    files, shape, tokenizer: See `record.Model`.
    sha256: Computes the digest of the weight files, which stay open for it.
    """

    info: ModelInfo
    path: Path | None
    context: int
    rope_factor: float
    options: Mapping[str, Any]
    files: int | None
    shape: dict[str, Any] | None
    tokenizer: Callable[[], str | None]
    sha256: Callable[[Progress], str]

    @classmethod
    def of(cls, llama: Llama) -> Self:
        """Describe a loaded model."""
        scaling, tokenizer = llama.args.rope_scaling, llama.tokenizer
        files = llama.engine.files
        return cls(
            info=llama.info,
            path=llama.path,
            context=llama.context,
            rope_factor=scaling.factor if scaling else 1.0,
            options=llama.options,
            files=len(files.names),
            shape=asdict(llama.args),
            tokenizer=lambda: tokenizer.fingerprint,
            sha256=files.sha256,
        )


@dataclass
class Session:
    """Prompts in, answers onto the console. Interrupted at any point it stays as it was before the prompt.

    loading: the model, there already or on its way.
    open: loads another model, by its path or name and its precision, with the session's other options.
    interactive: whether a person watches, so that what comes bit by bit is shown bit by bit.
    lists_candidates: whether a number of candidates was asked for, so that a pipe gets a line for each.
    debug: an error that nothing foresaw ends the session with its traceback.
    moments: each text that was answered, the newest last; `now` is that one. past: the texts before those, of a
    session that was loaded.
    turns: what was typed and what it was answered, for /save, where `keeps_turns`. shown: what was typed and
    printed, for /export. page: the view that was shown last, for /picture; None for the answer.
    chat: the conversation that each line goes on with; None where each line is a prompt.
    interventions: changes to the network that stay on; `llama` is the model with them, `intact` the one without.
    walk: where /step is.
    keyboard: of the terminal on which the lines are typed; None if they come from a pipe.
    first_model, first_settings, first_system: what the session began with, for /save too.
    """

    loading: Loading
    console: Console
    settings: Settings
    open: Callable[[str, str, Progress], Llama]
    interactive: bool = False
    lists_candidates: bool = False
    keeps_turns: bool = True
    debug: bool = False
    ended: bool = False
    moments: list[Snapshot] = field(default_factory=list)
    past: list[Past] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    shown: list[RenderableType] = field(default_factory=list)
    page: Page | None = None
    explained: set[str] = field(default_factory=set)
    chat: Chat | None = None
    first_model: InitialModel | None = None
    interventions: tuple[Intervention, ...] = ()
    walk: Any | None = None
    keyboard: Keyboard | None = None

    def __post_init__(self) -> None:
        self._changed: Llama | None = None
        self.first_settings = replace(self.settings)
        self.first_system = None if self.chat is None else self.chat.system

    @property
    def llama(self) -> Llama:
        """The model that answers, with the interventions that are on."""
        return self._changed or self.intact

    @property
    def intact(self) -> Llama:
        """The model as it was loaded; while it is on its way this waits for it and shows how far it is."""
        if self.loading.ended:
            return self.loading.wait()
        with progress_bar(self.console) as progress:
            return self.loading.wait(progress)

    @property
    def not_live(self) -> str:
        """Where the session is that has no live prediction; "" if it can have one."""
        if self.keyboard is None:
            return "in a pipe"
        if self.console.is_dumb_terminal:
            return "on a terminal that cannot show it"
        if self.settings.plain:  # a screen reader would never be silent
            return "with --plain"
        return "in a chat" if self.chat else ""  # a message is not a text that the model would continue

    @property
    def is_live(self) -> bool:
        """Whether the model predicts while a line is typed."""
        return self.settings.live and not self.not_live

    @property
    def stage(self) -> tuple[str, int, int] | None:
        """What goes on in the background, how much of it is done and how much there is."""
        if not self.loading.ended:
            return self.loading.stage
        return None if self.loading.error else self.loading.wait().preparing

    def switch(self, source: str | None, precision: str) -> None:
        """Go on with another model, or without one in another precision, and answer the text with it.

        Where it cannot be loaded, all stays as it was. Interventions go on in another precision, and end with
        another model.
        """
        old, now = self.intact, self.now
        interventions = self.interventions if source is None else ()
        with self.progress() as progress:
            new = self.open(source or str(old.path), precision, progress)
            try:
                new.prepare(progress)
                answering = _changed(new, interventions)
                if now:  # another model has its own tokens
                    text = now.ids if source is None else self.text_of(now.ids)
                    special = self.settings.special
                    prediction = (answering or new).predict(
                        text, top=self.settings.top, special=special, progress=progress
                    )
            except BaseException:
                new.close()
                raise
        moments, past = (self.moments, self.past) if source is None else ([], [])
        if now:
            offered = (prediction.next.id,) if now.offered else ()  # nothing, where a chat's answer is complete
            moments = [*moments[1 - _MOMENTS :], Snapshot(prediction, offered, interventions)]
        # One call, so that Ctrl-C never leaves a part of one model's session and a part of another's.
        vars(self).update(
            loading=Loading.ended_with(new),
            interventions=interventions,
            _changed=answering,
            moments=moments,
            past=past,
            chat=self.chat if source is None else None,  # another model has its own format of one
            page=None if now else self.page,
        )
        old.close()
        if now and self.interactive and offered:
            self._explain(prediction, 0)

    def intervene(self, interventions: Sequence[Intervention]) -> Effect | None:
        """Let these changes to the network be on from now on, and no others; the text is answered with them.

        Returns what they change about that answer; None where there is no text, or nothing is on.
        """
        on = tuple(interventions)
        changed = _changed(self.intact, on)
        moments, effect = self.moments, None
        if now := self.now:
            with self.progress() as progress:
                prediction = (changed or self.intact).predict(now.ids, top=self.settings.top, progress=progress)
            effect = self._effect(changed, on, now.ids) if changed else None
            moment = Snapshot(prediction, (prediction.next.id,) if now.offered else (), on)
            moments = [*moments[1 - _MOMENTS :], moment]
        # Only now, so that Ctrl-C leaves everything as it was.
        self.interventions, self._changed, self.moments, self.page = on, changed, moments, None
        return effect

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Ctrl-C in here takes back what was done to the text and to the network."""
        before = self.interventions, self._changed, self.moments, self.page
        try:
            yield
        except KeyboardInterrupt:
            self.interventions, self._changed, self.moments, self.page = before
            raise

    @property
    def labels(self) -> list[str]:
        """The names of the interventions that are on."""
        return [intervention.label for intervention in self.interventions]

    def effect(self) -> Effect:
        """What the interventions change about the answer to the text so far."""
        return self._effect(self.llama, self.interventions, self.ids)

    def _effect(self, changed: Llama, on: Sequence[Intervention], ids: Sequence[int]) -> Effect:
        from llama_scratch.microscope.effect import effect

        labels = [intervention.label for intervention in on]
        with self.progress() as progress:
            return effect(self.intact, changed, ids, labels, self.settings.top, progress)

    # --- The text ---

    @property
    def now(self) -> Snapshot | None:
        """The newest text and what comes next; None before the first."""
        return self.moments[-1] if self.moments else None

    @property
    def texts(self) -> list[Snapshot | Past]:
        """All texts that are remembered, the newest last."""
        return [*self.past, *self.moments]

    @property
    def before(self) -> Snapshot | Past | None:
        """The text that /undo goes back to; None if there is none."""
        texts = self.texts
        return texts[-2] if len(texts) > 1 else None

    def forget(self, **state: Any) -> None:
        """Begin without a text. state: further fields by their names, set in the same step."""
        vars(self).update(state, moments=[], past=[], page=None)

    @property
    def ids(self) -> list[int]:
        """The text so far. Raises `UsageError` where there is none."""
        if self.now is None:
            raise UsageError("There is no text yet; give a prompt first.")
        return self.now.ids

    @property
    def offered(self) -> Sequence[int]:
        """The tokens that Enter accepts: the predicted one, or all that was generated."""
        return self.now.offered if self.now else ()

    def encode(self, text: str) -> list[int]:
        """The ids that the model sees for a prompt."""
        return self.llama.encode(text, special=self.settings.special)

    def meant(self, argument: str) -> list[int]:
        """The ids of the text after a command, or without one those of the text so far."""
        if not argument and self.now is None:
            raise UsageError("There is no text yet; give a prompt first, or give the text after the command.")
        return self.encode(argument) if argument else self.ids

    def text_of(self, ids: Sequence[int]) -> str:
        """Ids as text, without the beginning-of-text token."""
        begin = 1 if ids and ids[0] == self.llama.tokenizer.bos_id else 0
        return self.llama.tokenizer.decode(ids[begin:])

    def predict(self, prompt: Prompt) -> Prediction:
        """What comes after a prompt, which is the text from now on."""
        with self.progress() as progress:
            prediction = self.llama.predict(
                prompt, top=self.settings.top, special=self.settings.special, progress=progress
            )
        # One assignment, so that Ctrl-C never leaves the offer of one text behind another.
        moment = Snapshot(prediction, (prediction.next.id,), self.interventions)
        self.moments, self.page = [*self.moments[1 - _MOMENTS :], moment], None  # the answer is what was shown last
        return prediction

    def offer(self, ids: Sequence[int]) -> None:
        """Let Enter add these tokens to the text."""
        if self.now and ids:
            self.moments = [*self.moments[:-1], replace(self.now, offered=tuple(ids))]

    def undo(self) -> Snapshot:
        """Go back to the text before, and to the network that answered it; returns its moment.

        Raises `UsageError` if there is none.
        """
        if (before := self.before) is None:
            raise UsageError("There is nothing to undo, expected an earlier text.")
        changed = self._changed
        if before.interventions != self.interventions:
            changed = _changed(self.intact, before.interventions)
        moments, past = self.moments[:-1], self.past
        if isinstance(before, Past):
            moments, past = [self._answered(before, changed)], self.past[:-1]
        # One call, so that Ctrl-C never leaves one text with the network of another.
        vars(self).update(moments=moments, past=past, interventions=before.interventions, _changed=changed, page=None)
        return moments[-1]

    def _answered(self, past: Past, changed: Llama | None) -> Snapshot:
        """Answer a text of a loaded session by the network that answered it then, or by the one given."""
        llama = changed or self.intact
        with self.progress() as progress:
            prediction = llama.predict(self._typed(past), top=past.top, progress=progress)
        offered = (prediction.next.id,) if past.offered is None else past.offered
        return Snapshot(prediction, offered, past.interventions)

    def _typed(self, past: Past) -> Prompt:
        """The text as it was typed, for the same warnings, if it still has the same tokens; else its tokens."""
        return past.prompt if self.intact.encode(past.prompt) == past.ids else past.ids

    def answer_again(self) -> None:
        """Answer the newest text again, with as many candidates as the settings say now."""
        if now := self.now:
            past = Past(now.ids, now.prompt, self.settings.top, now.offered, now.interventions)
            self.moments = [*self.moments[:-1], self._answered(past, self._changed)]

    def resume(self, texts: Sequence[Past], interventions: Sequence[Intervention], **state: Any) -> Prediction | None:
        """Replace this session's state by that of another one, or leave all as it is if that fails.

        Args:
            texts: The other session's texts, the newest last. That one is answered at once.
            interventions: The changes to the network that are on from now on.
            state: Further fields by their names.

        Returns:
            The answer to the newest text, None if there is none.
        """
        on = tuple(interventions)
        changed = _changed(self.intact, on)
        moments = [self._answered(text, changed) for text in texts[-1:]]
        # One call, so that Ctrl-C never leaves a part of one session and a part of another.
        vars(self).update(
            state,
            moments=moments,
            past=list(texts[:-1]),
            page=None,
            walk=None,
            interventions=on,
            _changed=changed,
        )
        return moments[-1].prediction if moments else None

    # --- Answers on the screen ---

    def ask(self, prompt: Prompt, added: int = 0) -> dict[str, Any]:
        """Answer a text and show the answer; the last `added` of its tokens are new. Returns its object."""
        prediction = self.predict(prompt)
        if self.interactive:
            self._explain(prediction, added)
        changes = self.changes()
        generated = self.generate(self.settings.generate) if self.settings.generate else None
        return as_json(prediction, generated) | changes

    def changes(self) -> dict[str, Any]:
        """What an answer's object has of the interventions that are on, shown where a person watches."""
        if not self.interventions:
            return {}
        effect = self.effect()
        if self.interactive:
            self.show(answer.before_and_after(effect))
        return {"effect": effect.as_json()}

    def say(self, line: str) -> dict[str, Any]:
        """Answer a line: as the next message of the chat where there is one, else as a prompt. Returns its object."""
        return self._say_in_chat(self.chat, line) if self.chat else self.ask(line)

    def _say_in_chat(self, chat: Chat, line: str) -> dict[str, Any]:
        """Take a line as the next message and let the model answer; shown as it comes where a person watches.

        Returns the object of the answer: `tokens` and `next` are those before it, `generated` is the answer. The
        session's text becomes the question, and then the question with the answer: /undo takes back either.
        """
        llama = self.llama
        question = chat.question(llama, self.now.ids if self.now else [], line)
        if len(question.ids) >= llama.context:
            raise ContextLengthError(
                f"The conversation has {len(question.ids):,} tokens with this message, expected under "
                f"{llama.context:,}, so that there is room for an answer; /clear begins a new one."
            )
        before = self.predict(question.ids)
        before = replace(
            before,
            prompt=replace_surrogates(line),
            warnings=(*before.warnings, *llama.tokenizer.warnings(line, special=True)),
        )
        chat.questions.append(question)
        if self.interactive:
            for sentence in before.warnings:
                if sentence not in self.explained:  # about the model, and shown before
                    self.show(text.warning(sentence))
            self.explained.update(llama.warnings)
        changes = self.changes()  # of the answer's first token
        answer = self.generate(self.settings.generate or ANSWER)
        if answer.ids:
            self.predict([*question.ids, *answer.ids])
        if answer.finish_reason == "stop":  # it is complete, so Enter has nothing to add
            self.moments = [*self.moments[:-1], replace(self.moments[-1], offered=())]
        return as_json(before, answer) | changes

    def extend(self, ids: Sequence[int]) -> dict[str, Any]:
        """Add tokens to the text and answer it."""
        return self.ask([*self.ids, *ids], added=len(ids))

    def show_answer(self, prediction: Prediction, added: int = 0) -> None:
        """Show an answer; the last `added` tokens of its text are new, which then stands above it."""
        if added:
            ids = [token.id for token in prediction.tokens]
            old, new = self.text_of(ids[:-added]), self.llama.tokenizer.decode(ids[-added:])
            self.show(answer.context(old, new, self.console.width))
        self.show(answer.plain_answer(prediction) if self.settings.plain else answer.answer(prediction))

    def _explain(self, prediction: Prediction, added: int) -> None:
        """Show an answer with those warnings whose cause was not explained yet, and what their effect is."""
        fresh = tuple(caution for caution in prediction.warnings if caution.cause not in self.explained)
        self.show_answer(replace(prediction, warnings=fresh), added)
        if len(self.ids) > 1 and any(caution.cause in (ENDS_IN_SPACE, ENDS_IN_A_WORD) for caution in fresh):
            without = self.llama.predict(self.ids[:-1], top=1)
            self.show(answer.effect(prediction.next, without.next))
        self.explained.update(caution.cause for caution in fresh)

    def generate(self, count: int) -> Generated:
        """Go on from the text for `count` tokens, which are offered then; shown bit by bit where a person watches."""
        if self.interactive:
            generated = self._stream(self.ids, count)
        else:
            generated = self.llama.complete(self.ids, count, self.settings.sampling)
        self.offer(generated.ids)
        return generated

    def _stream(self, ids: Sequence[int], count: int) -> Generated:
        """Show a continuation as it comes; Ctrl-C ends it and keeps what came."""
        steps: list[Step] = []
        begin = Text(" " if self.chat else " …", style="dim")
        # A screen reader would read a word twice that is erased, and a dumb terminal cannot erase it.
        wraps = not (self.settings.plain or self.console.is_dumb_terminal)
        words = Wrapped(self.console.width if wraps else sys.maxsize, begin.plain, indent=" ")

        def write(text: str, *, final: bool = False) -> None:
            written = words.resize(self.console.width) if wraps else []
            written += words.push(readable(text), final=final)
            if written:
                self.console.print(*written, **_AS_IT_IS)

        self.console.print(begin, **_AS_IT_IS)
        reason = "length"
        start = time.perf_counter()
        try:
            for step in self.llama.continuation(ids, count, self.settings.sampling):
                steps.append(step)
                write(step.text)
            if len(steps) < min(count, self.llama.context - len(ids)):
                reason = "stop"
        except KeyboardInterrupt:
            reason = "interrupted"
        write("", final=True)
        self.console.print(Text("  stopped" if reason == "interrupted" else "", style="dim") + "\n")
        self.record(Text.assemble(begin, words.text.removeprefix(begin.plain)))
        new = tuple(step.id for step in steps)
        return Generated(
            text=self.llama.tokenizer.decode(new),
            ids=new,
            logprobs=tuple(step.logprob for step in steps),
            finish_reason=reason,
            decode_s=time.perf_counter() - start,
        )

    def typed(self, line: str) -> None:
        """Let /export write a line that was typed."""
        self.record(Text.assemble((self.loading.name, "bold cyan"), "> ", readable(line)))

    def record(self, view: RenderableType) -> None:
        """Let /export write something that was printed. Without commands there is no /export."""
        if self.keeps_turns:
            self.shown.append(view)

    def keep(self, turn: Turn) -> None:
        """Remember a line and its answer."""
        if self.keeps_turns:
            if self.first_model is None and self.loading.ended:
                self.first_model = InitialModel.of(self.llama)
            self.turns.append(turn)

    def show(self, view: RenderableType) -> None:
        """Print something that belongs to the session's screen."""
        self.record(view)
        self.console.print(view, markup=False, highlight=False)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """What to tell how far something is, shown where a person watches."""
        with progress_bar(self.console) as progress:
            yield progress

    @property
    def offer_text(self) -> str:
        """What Enter would add, as text."""
        return self.llama.tokenizer.decode(self.offered)

    @property
    def continued_text(self) -> str:
        """The text so far with what was offered, as a person could have typed it."""
        return self.text_of(self.ids) + self.typeable(self.offered)

    def typeable(self, ids: Sequence[int]) -> str:
        """Tokens as text that can stand in a prompt: nothing of special ones, nor of parts of characters."""
        tokenizer = self.llama.tokenizer
        text = tokenizer.decode(id for id in ids if id not in tokenizer.untypeable)
        return "" if "\ufffd" in text else text

    def offer_next(self) -> None:
        """Let Enter add the next candidate of the last answer in place of what is offered."""
        if self.now:
            candidates = [candidate.id for candidate in self.now.prediction.top]
            offered = self.offered[0] if len(self.offered) == 1 else None
            following = candidates.index(offered) + 1 if offered in candidates else 0
            self.offer([candidates[following % len(candidates)]])


def _changed(llama: Llama, interventions: Sequence[Intervention]) -> Llama | None:
    """The model with these; None where there are none."""
    if not interventions:
        return None
    from llama_scratch.microscope.interventions import changed

    return changed(llama, interventions)
