"""The read-eval-print loop of the session on a terminal."""

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
    """Read and answer lines until Ctrl-D or /quit.

    Re-raises an exception from loading the model.
    """
    _Loop(session).run()


class _Loop:
    """The state of the loop.

    It reads input immediately, and prints the banner once the model is loaded.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._interrupts = Interrupts()
        self._keyboard = session.screen.keyboard = Keyboard(session.screen.console)
        self._line = PromptEditor(session, self._keyboard, self._greet)
        self._greeted = False
        self._draft = ""  # initial text of the next line

    def run(self) -> None:
        with self._keyboard.session():
            self._run()

    def _run(self) -> None:
        session = self._session
        if session.screen.console.is_dumb_terminal:  # it cannot print the banner above the prompt later
            with self._keyboard.collecting(), self._interrupts.armed():
                session.state.loading.wait()
        while not session.ended:
            self._greet()
            draft, self._draft = self._draft, ""
            try:
                with self._interrupts.ending(self._line.end):
                    line = self._line.read(draft)
            except KeyboardInterrupt:
                session.screen.console.print(Text(" To exit, press Ctrl-D or enter /quit.", style="dim"))
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
            except Exception as error:  # a failing line does not end the session
                if session.debug or error is session.state.loading.error:
                    raise
                session.screen.show(text.error(unexpected(error)))

    def _begin(self) -> None:
        """Start loading, and import modules that the answer needs.

        At this point, Ctrl-C cannot interrupt the import.
        """
        self._session.state.loading.start()
        import rich.progress  # noqa: F401

    def _take(self, line: str) -> None:
        session = self._session
        self._line.live.pause()
        if not line and not session.state.offered:
            return
        if not line.startswith("/") or line.startswith("//"):
            _ = session.llama  # wait for the model, to print the banner above the answer
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
        """Start the chat if one was requested and the model supports it.

        Returns:
            The error message if the chat could not start, in which case lines are prompts; otherwise "".
        """
        chat = self._session.state.chat
        self._session.update(chat=None)
        try:
            if chat:
                self._session.update(chat=checked(self._session.llama, chat.system))
        except LlamaScratchError as error:
            self._session.update(initial_system=None)  # so that a replay uses prompts too
            return str(error)
        return ""
