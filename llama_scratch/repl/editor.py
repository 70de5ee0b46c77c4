"""The prompt editor: line editing, token colors and suggestions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.auto_suggest import Suggestion
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import FormattedText, to_plain_text
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.layout.utils import explode_text_fragments
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.renderer import CPR_Support
from prompt_toolkit.styles import Style
from rich.cells import cell_len, set_cell_size

from llama_scratch.render.shades import has_truecolor
from llama_scratch.render.surprise import surprise_style, terminal_styles
from llama_scratch.render.text import percent, visible
from llama_scratch.repl.commands import COMMANDS, completions, escaped, is_command, unescaped
from llama_scratch.repl.history import open_history
from llama_scratch.repl.keyboard import Keyboard
from llama_scratch.repl.live import LivePredictor, Reading, is_live
from llama_scratch.repl.offers import continued_text, offer_next, offer_text, typeable
from llama_scratch.repl.session import Session

_FIRST_HINT, _FIRST_QUESTION = "The capital of France is", "What is the capital of France?"
# One of the 16 ANSI colors, because every terminal theme keeps them legible on its background.
_GRAY = "ansibrightblack"
_STYLE = {"bottom-toolbar": "noreverse", "auto-suggestion": _GRAY}


class PromptEditor:
    """Read lines from a terminal, with live prediction if it is turned on.

    Args:
        session: The session.
        keyboard: The terminal's keyboard.
        greet: Called once the model is loaded, to print the banner above the prompt.
    """

    def __init__(self, session: Session, keyboard: Keyboard, greet: Callable[[], None]):
        self._session = session
        self._keyboard = keyboard
        self._greet = greet
        self._greeted = False
        self._choice = 0  # index of the candidate suggested after the cursor
        self._ended = False
        self.live = LivePredictor(session, self._from_live)
        plain, console = session.settings.plain, session.screen.console
        truecolor = has_truecolor(console)
        few_colors = ColorDepth.DEPTH_1_BIT if console.no_color or plain else None
        self._editor: PromptSession[str] = PromptSession(
            input=keyboard.input,
            history=open_history(session),
            key_bindings=self._keys(),
            multiline=True,  # keeps a pasted block of lines in one prompt; Enter still sends it
            prompt_continuation=lambda _width, _line, wraps: "" if wraps else "… ",
            enable_history_search=True,
            completer=_Commands(session),
            complete_while_typing=False,
            enable_suspend=True,
            input_processors=[_Surprise(self._reading)],
            bottom_toolbar=None if plain else self._toolbar,
            style=Style.from_dict(_STYLE | _surprise_styles(truecolor)),
            color_depth=ColorDepth.DEPTH_24_BIT if truecolor and not plain else few_colors,
        )
        self._editor.default_buffer.on_text_changed += self._typed

    def read(self, draft: str = "") -> str:
        """Read the next line.

        Args:
            draft: The initial text of the line.

        Returns:
            The line; "" if loading the model failed.

        Raises:
            KeyboardInterrupt: If Ctrl-C is pressed on an empty line.
            EOFError: If Ctrl-D is pressed on an empty line, or `end` was called.
        """
        return self._editor.prompt(
            lambda: _message(self._session),
            default=draft,
            placeholder=lambda: _placeholder(self._session),
            rprompt=lambda: _stage(self._session),
            pre_run=self._begin,
            handle_sigint=False,  # see `Interrupts`
        )

    def end(self) -> None:
        """End the current or next prompt.

        Safe to call from any thread and from a signal handler.
        """
        self._ended = self._keyboard.ended = True
        if not self._keyboard.in_foreground():
            # The shell would receive the terminal's reply to a cursor position request (CPR).
            self._editor.app.renderer.cpr_support = CPR_Support.NOT_SUPPORTED
        self._soon(self._exit)

    def _exit(self) -> None:
        if not self._editor.app.is_done:
            self._editor.app.exit(exception=EOFError)

    # --- Loading and live prediction while the user types ---

    def _begin(self) -> None:
        if self._ended:
            self._exit()
        self._editor.app.create_background_task(self._watch())

    async def _watch(self) -> None:
        """Load the model while the prompt shows the progress, then print the banner.

        Starts once the prompt is on the screen. If loading fails, it ends the prompt, and the loop then ends the
        session.
        """
        app, loading = self._editor.app, self._session.state.loading
        self._typed(self._editor.default_buffer)  # for a restored draft
        loading.start()
        while not loading.ended:
            await asyncio.sleep(0.1)
            app.invalidate()
        if loading.error is None:
            if not self._greeted:  # the prompt is redrawn below the banner
                self._greeted = True
                await run_in_terminal(self._greet)
            self._typed(self._editor.default_buffer)
        elif not app.is_done:
            app.exit(result="")
        while self._session.state.loading.background and not app.is_done:
            await asyncio.sleep(0.2)
            app.invalidate()

    def _typed(self, buffer: Buffer) -> None:
        self._choice = 0
        line = buffer.text
        if is_command(line):
            self.live.request(None)
            longer = next((c for c in completions(self._session, line) if len(c) > len(line)), line)
            buffer.suggestion = Suggestion(longer[len(line) :])
        elif line and is_live(self._session):
            self.live.request(unescaped(line))
            self._offer()
        else:
            self.live.request(None)

    def _from_live(self) -> None:
        """Handle a new reading. Called from the live thread."""
        self._soon(self._offer)

    def _soon(self, call: Callable[[], None]) -> None:
        """Schedule a call on the prompt's event loop, if it is running."""
        if (loop := self._editor.app.loop) is not None:
            try:
                loop.call_soon_threadsafe(call)
            except RuntimeError:  # the prompt and its event loop have just ended
                return

    def _reading(self) -> Reading | None:
        """Return the live reading of the prompt, or of an earlier version of it.

        None if the line is empty or a command, or nothing has been read yet.
        """
        buffer = self._editor.default_buffer
        return self.live.reading if buffer.text and not is_command(buffer.text) else None

    def _offer(self) -> None:
        """Suggest the chosen candidate after the cursor.

        Does not change the suggestion if the reading is of an earlier version of the line.
        """
        buffer, reading = self._editor.default_buffer, self._reading()
        if reading and reading.line == unescaped(buffer.text):
            candidate = reading.candidates[self._choice % len(reading.candidates)]
            buffer.suggestion = Suggestion(typeable(self._session, [candidate.id]))
        self._editor.app.invalidate()

    def _toolbar(self) -> FormattedText:
        reading = self._reading()
        if reading is None or not is_live(self._session):
            return FormattedText()
        current = reading.line == unescaped(self._editor.default_buffer.text)
        candidate = reading.candidates[self._choice % len(reading.candidates) if current else 0]
        parts = [
            ("bold" if current else _GRAY, f" {visible(candidate.text).plain}"),
            ("" if current else _GRAY, f" {percent(candidate.probability)}"),
            (_GRAY, f" · entropy {reading.entropy_bits:.2f} bits"),
            (_GRAY, f" · {reading.n_tokens} token{'s' if reading.n_tokens != 1 else ''}"),
            (_GRAY, " · Tab: accept"),
            (_GRAY, " · Shift-Tab: next candidate"),
        ]
        while sum(len(text) for _, text in parts) > self._session.screen.console.width and len(parts) > 1:
            parts.pop()
        return FormattedText(parts)

    # --- Keys ---

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        typing = has_focus(DEFAULT_BUFFER)  # not during a Ctrl-R search, which uses these keys itself
        empty = Condition(lambda: not get_app().current_buffer.text)
        command = Condition(lambda: is_command(get_app().current_buffer.text))
        menu = Condition(lambda: get_app().current_buffer.complete_state is not None)

        @keys.add("enter", filter=typing)
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.complete_state and event.current_buffer.complete_state.current_completion:
                event.current_buffer.complete_state = None
            else:
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

        @keys.add("tab", filter=typing & ~command & ~empty)
        def _(event: KeyPressEvent) -> None:
            if (suggestion := event.current_buffer.suggestion) and event.current_buffer.document.is_cursor_at_the_end:
                event.current_buffer.insert_text(suggestion.text)

        @keys.add("tab", filter=typing & empty)
        @keys.add("right", filter=typing & empty)
        def _(event: KeyPressEvent) -> None:
            if self._session.now and self._session.state.chat is None:
                event.current_buffer.insert_text(escaped(continued_text(self._session)))

        @keys.add("s-tab", filter=typing & ~command & ~menu)
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                self._choice += 1
                self._offer()
            else:
                offer_next(self._session)

        @keys.add("c-t", filter=typing & empty)
        def _(event: KeyPressEvent) -> None:
            event.app.exit(result="/surprisal")

        return keys


class _Commands(Completer):
    """Completion of commands and their arguments."""

    def __init__(self, session: Session):
        self._session = session

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if is_command(line):
            for completion in completions(self._session, line):
                name, _, argument = completion.partition(" ")
                command = COMMANDS.get(name[1:])
                about = f"{command.heading}: {command.summary}" if command and not argument else ""
                display = argument.strip() or name
                yield Completion(completion, start_position=-len(line), display=display, display_meta=about)


class _Surprise(Processor):
    """Color the characters of the line by their surprisal."""

    def __init__(self, reading: Callable[[], Reading | None]):
        self._reading = reading

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        document, fragments = transformation_input.document, transformation_input.fragments
        if (reading := self._reading()) is None:
            return Transformation(fragments)
        text = unescaped(document.text)
        # Offset of this row in the scored text, from which the escaping slash was removed.
        begin = document.translate_row_col_to_index(transformation_input.lineno, 0) + len(text) - len(document.text)
        known = min(_common(text, reading.line), len(reading.bits))
        characters = explode_text_fragments(fragments)
        length = len(document.lines[transformation_input.lineno])
        for i in range(length, len(characters)):  # the suggestion after the row
            style, char = characters[i][:2]
            characters[i] = (style, char if char.isprintable() else visible(char).plain)
        for i in range(min(len(characters), length)):
            if 0 <= begin + i < known and (name := surprise_style(reading.bits[begin + i])):
                characters[i] = (f"{characters[i][0]} class:{name}", characters[i][1])
        return Transformation(characters)


def _common(a: str, b: str) -> int:
    """Return the length of the common prefix of two lines."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def _surprise_styles(truecolor: bool) -> dict[str, str]:
    """Convert the surprisal styles to the notation of prompt_toolkit.

    For example, "#111111 on #fbdcb4" becomes "#111111 bg:#fbdcb4".
    """
    return {name: style.replace("on ", "bg:") for name, style in terminal_styles(truecolor).items()}


# On a narrower terminal the prompt omits the model name, to leave room for typing.
_NARROW = 60


def _message(session: Session) -> FormattedText:
    name = session.state.loading.name if session.screen.console.width >= _NARROW else ""
    if session.state.chat:
        name = f"{name} chat".lstrip()
    changes = _changes(session.state.labels, session.screen.console.width // 3)
    return FormattedText([("bold ansicyan", name), ("bold ansimagenta", changes), ("", "> ")])


def _changes(labels: list[str], room: int) -> str:
    """Format the labels of the active interventions for the prompt.

    As many labels as fit into `room` cells are followed by the number of remaining ones, as in [-L5.H3 +2].
    """
    if not labels:
        return ""
    for count in range(len(labels), 0, -1):
        more = f" +{len(labels) - count}" if count < len(labels) else ""
        text = " ".join(labels[:count])
        if cell_len(text + more) <= room:
            break
    else:
        text = set_cell_size(text, room - len(more) - 1).rstrip() + "…"
    return f"[{text}{more}]"


def _stage(session: Session) -> FormattedText:
    """Format the progress of loading or preparing the model.

    It is displayed at the right end of the line. It is empty once the line has been sent, so it does not remain on the
    screen.
    """
    if get_app().is_done or (progress := session.state.loading.background) is None:
        return FormattedText()
    stage, done, total = progress
    # A screen reader would read every new number aloud.
    share = f" {100 * done // total} %" if total and not session.settings.plain else " …"
    return FormattedText([(_GRAY, stage.capitalize() + share)])


def _placeholder(session: Session) -> FormattedText:
    """Format the gray hint on an empty line: the offered tokens, or an example.

    It is empty once the line has been sent, and during a search.
    """
    if get_app().is_done or get_app().layout.is_searching:
        return FormattedText()
    room = session.screen.console.width - len(to_plain_text(_message(session))) - 1
    example = _FIRST_QUESTION if session.state.chat else _FIRST_HINT
    hint = example if len(example) <= room else ""
    if session.state.offered:
        offer = visible(offer_text(session)).plain
        hint = offer + "  (Enter accepts)"
        if len(hint) > room:
            hint = offer[: room - 2] + " ⏎"
    return FormattedText([(_GRAY, hint)])
