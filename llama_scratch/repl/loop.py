"""The session on a terminal: line editing, history and keys by prompt_toolkit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
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


def run(session: Session) -> None:
    """Read prompts until Ctrl-D or /quit."""
    interrupts = _Interrupts()
    reader = _reader(session)
    session.console.print(terminal.banner(session.llama.info, session.llama.context))
    while not session.ended:
        try:
            line = reader.prompt(
                _message(session),
                placeholder=lambda: _placeholder(session),
                handle_sigint=False,  # see `_Interrupts`
            )
        except KeyboardInterrupt:
            session.console.print(Text(" Ctrl-D or /quit leaves.", style="dim"))
            continue
        except EOFError:
            return
        try:
            with interrupts.armed():
                _take(session, line)
        except KeyboardInterrupt:
            session.console.print(Text("\n Cancelled.", style="dim"))
        except LlamaScratchError as error:
            session.console.print(terminal.error(str(error)))


def _take(session: Session, line: str) -> None:
    if not line:
        session.accept()
    elif is_command(line):
        run_command(session, line)
    else:
        session.ask(unescaped(line))


def _message(session: Session) -> FormattedText:
    return FormattedText([("bold ansicyan", session.llama.info.name), ("", "> ")])


def _placeholder(session: Session) -> FormattedText:
    """What an empty line offers, in grey; nothing of it stays once the line is sent or searched."""
    if get_app().is_done or get_app().layout.is_searching:
        return FormattedText()
    room = session.console.width - len(session.llama.info.name) - 3
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
