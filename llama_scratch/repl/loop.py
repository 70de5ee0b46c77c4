"""The session on a terminal: line editing, history and keys by prompt_toolkit."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from rich.text import Text

from llama_scratch.errors import LlamaScratchError
from llama_scratch.render import terminal
from llama_scratch.repl.commands import is_command, run_command, unescaped
from llama_scratch.repl.session import Session
from llama_scratch.tokenizer import replace_surrogates

_FIRST_HINT = "The capital of France is"


class _History(FileHistory):
    """A history file; a line that a terminal pasted with broken characters is kept in whole ones."""

    def store_string(self, string: str) -> None:
        super().store_string(replace_surrogates(string))


class _Interrupts:
    """Ctrl-C as an exception only while there is something to cancel, and only once.

    At the prompt it is a key. Between the two it is nothing: an exception there would end the program.
    """

    def __init__(self) -> None:
        self._armed = False
        signal.signal(signal.SIGINT, self._handle)
        sys.unraisablehook = _report_unless_interrupt

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Where Ctrl-C cancels."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False


def _report_unless_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """An interrupt that fell into a finalizer, where nothing can be raised, is lost without a word."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)


def run(session: Session) -> None:
    """Read prompts until Ctrl-D or /quit. Raises what loading the model raised, as soon as it does."""
    _Loop(session).run()


class _Loop:
    """Prompts are read from the first moment on; the banner is printed once the model is there."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._interrupts = _Interrupts()
        self._reader = _reader(session)
        self._greeted = False
        self._draft = ""  # what the next prompt begins with

    def run(self) -> None:
        session = self._session
        if session.console.is_dumb_terminal:  # where nothing can be printed above what is being typed
            session.loading.wait()
        while not session.ended:
            self._greet()
            try:
                line = self._read()
            except KeyboardInterrupt:
                session.console.print(Text(" Ctrl-D or /quit leaves.", style="dim"))
                continue
            except EOFError:
                return
            self._begin()
            try:
                with self._interrupts.armed():
                    self._take(line)
            except KeyboardInterrupt:
                session.console.print(Text("\n Cancelled.", style="dim"))
                if not session.loading.ended:
                    self._draft = line
            except LlamaScratchError as error:
                if error is session.loading.error:
                    raise
                session.console.print(terminal.error(str(error)))

    def _read(self) -> str:
        draft, self._draft = self._draft, ""
        return self._reader.prompt(
            lambda: _message(self._session),
            default=draft,
            placeholder=lambda: _placeholder(self._session),
            rprompt=lambda: _stage(self._session),
            pre_run=self._begin_watching,
            handle_sigint=False,  # see `_Interrupts`
        )

    def _begin(self) -> None:
        """Start what the first answer needs, at the latest before an interrupt may fall into it."""
        self._session.loading.start()
        import rich.progress  # noqa: F401

    def _begin_watching(self) -> None:
        if not self._greeted or self._session.stage:
            self._reader.app.create_background_task(self._watch())

    def _take(self, line: str) -> None:
        session = self._session
        if not line:
            session.accept()
        elif is_command(line):
            run_command(session, line)
        else:
            _ = session.llama  # waits for it, so that the banner stands above the answer
            self._greet()
            session.ask(unescaped(line))

    def _greet(self) -> None:
        if self._session.loading.ended and not self._greeted:
            llama = self._session.llama
            self._greeted = True
            self._session.console.print(terminal.banner(llama.info, llama.context))

    async def _watch(self) -> None:
        """While a prompt is typed: load, show how far that is, and then print the banner above the prompt.

        It begins once the prompt is on the screen. A loading that failed ends the prompt, and so the session.
        """
        app, loading = self._reader.app, self._session.loading
        self._begin()
        while not loading.ended:
            await asyncio.sleep(0.1)
            app.invalidate()
        if loading.error is None:
            if not self._greeted:
                await run_in_terminal(self._greet)
        elif not app.is_done:
            app.exit(result="")
        while self._session.stage and not app.is_done:
            await asyncio.sleep(0.2)
            app.invalidate()


def _message(session: Session) -> FormattedText:
    return FormattedText([("bold ansicyan", session.loading.name), ("", "> ")])


def _stage(session: Session) -> FormattedText:
    """How far the loading, or what follows it, is, at the right end of the line; nothing of it stays."""
    if get_app().is_done or (progress := session.stage) is None:
        return FormattedText()
    stage, done, total = progress
    # A screen reader would read every new number aloud.
    share = f" {100 * done // total} %" if total and not session.settings.plain else " …"
    return FormattedText([("ansibrightblack", stage.capitalize() + share)])


def _placeholder(session: Session) -> FormattedText:
    """What an empty line offers, in grey; nothing of it stays once the line is sent or searched."""
    if get_app().is_done or get_app().layout.is_searching:
        return FormattedText()
    room = session.console.width - len(session.loading.name) - 3
    hint = _FIRST_HINT if len(_FIRST_HINT) <= room else ""
    if session.offered:
        offer = terminal.visible(session.offer_text).plain
        hint = offer + "  (Enter accepts)"
        if len(hint) > room:
            hint = offer[: room - 2] + " ⏎"
    return FormattedText([("ansibrightblack", hint)])


def _reader(session: Session) -> PromptSession[str]:
    no_color = session.console.no_color or session.settings.plain
    return PromptSession(
        history=_open_history(session),
        key_bindings=_keys(),
        multiline=True,  # so that a paste of several lines stays in one piece; Enter still sends
        prompt_continuation=lambda _width, _line, wraps: "" if wraps else "… ",
        enable_history_search=True,
        color_depth=ColorDepth.DEPTH_1_BIT if no_color else None,
    )


def _keys() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # not while Ctrl-R searches, where these keys mean something else

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


def _open_history(session: Session) -> History:
    path = user_state_path("llama-scratch", appauthor=False) / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        _ = path.read_bytes()
    except OSError as error:
        session.console.print(
            terminal.warning(f"The history cannot be kept in {path} ({error.strerror}), so it ends with this session.")
        )
        return InMemoryHistory()
    return _History(str(path))
