"""The session on a terminal: a line, its answer, the next line."""

from __future__ import annotations

from rich.text import Text

from llama_scratch.errors import LlamaScratchError, unexpected
from llama_scratch.render import reports, text
from llama_scratch.repl.conversation import checked
from llama_scratch.repl.dispatch import respond
from llama_scratch.repl.editor import PromptEditor
from llama_scratch.repl.interrupts import Interrupts
from llama_scratch.repl.keyboard import Keyboard
from llama_scratch.repl.live import is_live
from llama_scratch.repl.session import Session


def run(session: Session) -> None:
    """Read prompts until Ctrl-D or /quit. Raises what loading the model raised, as soon as it does."""
    _Loop(session).run()


class _Loop:
    """Prompts are read from the first moment on; the banner is printed once the model is there."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._interrupts = Interrupts()
        self._keyboard = session.screen.keyboard = Keyboard(session.screen.console)
        self._line = PromptEditor(session, self._keyboard, self._greet)
        self._greeted = False
        self._draft = ""  # what the next line begins with

    def run(self) -> None:
        with self._keyboard.session():
            self._run()

    def _run(self) -> None:
        session = self._session
        if session.screen.console.is_dumb_terminal:  # where nothing can be printed above what is being typed
            with self._keyboard.collecting(), self._interrupts.armed():
                session.state.loading.wait()
        while not session.ended:
            self._greet()
            draft, self._draft = self._draft, ""
            try:
                with self._interrupts.ending(self._line.end):
                    line = self._line.read(draft)
            except KeyboardInterrupt:
                session.screen.console.print(Text(" Ctrl-D or /quit leaves.", style="dim"))
                continue
            except EOFError:
                return
            self._begin()
            try:
                with self._keyboard.collecting(), self._interrupts.armed():
                    self._take(line)
            except KeyboardInterrupt:
                session.screen.show(Text("\n Cancelled.", style="dim"))
                if not session.state.loading.ended:
                    self._draft = line
            except LlamaScratchError as error:
                if error is session.state.loading.error:
                    raise
                session.screen.show(text.error(str(error)))
            except Exception as error:  # one line's trouble does not end the session
                if session.debug or error is session.state.loading.error:
                    raise
                session.screen.show(text.error(unexpected(error)))

    def _begin(self) -> None:
        """Start what the first answer needs, at the latest before an interrupt may fall into it."""
        self._session.state.loading.start()
        import rich.progress  # noqa: F401

    def _take(self, line: str) -> None:
        session = self._session
        self._line.live.pause()
        if not line and not session.state.offered:
            return
        if not line.startswith("/") or line.startswith("//"):
            _ = session.llama  # waits for it, so that the banner stands above the answer
            self._greet()
        session.screen.echo(session.state.loading.name, line)
        _, reply = respond(session, line)
        if reply and reply.view is not None:
            session.screen.show(reply.view)
        self._line.live.pause()

    def _greet(self) -> None:
        if self._session.state.loading.ended and not self._greeted:
            llama = self._session.llama
            self._greeted = True
            problem = self._begin_chat()
            live, chat = is_live(self._session), self._session.state.chat is not None
            self._session.screen.console.print(reports.banner(llama.info, llama.context, live=live, chat=chat))
            if problem:
                self._session.screen.console.print(text.error(problem))

    def _begin_chat(self) -> str:
        """Check that the model takes a conversation if one was asked for. If not, return why, and take prompts."""
        chat = self._session.state.chat
        self._session.update(chat=None)
        try:
            if chat:
                self._session.update(chat=checked(self._session.llama, chat.system))
        except LlamaScratchError as error:
            self._session.update(initial_system=None)  # so that a replay takes prompts too
            return str(error)
        return ""
