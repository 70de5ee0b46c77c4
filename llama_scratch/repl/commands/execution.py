"""/step: a debugger-style walk through the forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.live_render import LiveRender

from llama_scratch.errors import LlamaScratchError, UsageError, sanitize
from llama_scratch.render import reports, text
from llama_scratch.render.pages import execution as execution_pages
from llama_scratch.render.pages import value_view as value_pages
from llama_scratch.repl.commands.arguments import first_word, whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under, note, paged
from llama_scratch.repl.screen import SessionScreen
from llama_scratch.repl.session import Session
from llama_scratch.results import merged

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyPressEvent

    from llama_scratch.microscope.execution import ExecutionTrace
    from llama_scratch.repl.keyboard import Keyboard


# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Interpretability")

_ACTIONS = {"n": "next", "i": "into", "o": "out", "b": "back", "t": "to", "p": "print", "q": "end"}
# The pdb commands that mean exactly the same here, and hints for the other pdb commands.
_SAME_AS_PDB = {"s": "into", "step": "into", "pp": "print", "quit": "end", "exit": "end"}
_INSTEAD_OF_PDB = {
    **dict.fromkeys(("c", "cont", "continue"), "There are no breakpoints. 'to 5' goes to layer 5."),
    **dict.fromkeys(("r", "return"), "'out' leaves the function and stops after it has returned."),
    **dict.fromkeys(("u", "up"), "'out' leaves the function."),
    **dict.fromkeys(("d", "down"), "'into' enters a called function."),
    **dict.fromkeys(("w", "where"), "Each stop shows its callers in its first line."),
    **dict.fromkeys(("l", "ll", "list"), "Each stop shows its lines. /source model.py shows the whole file."),
}
_KEYS = (
    "Enter or n: next, i or s: into, o: out, b: back, t N: to layer N, p NAME or p NAME[…]: print, q: end. "
    "A number after a word repeats it: next 3."
)


@dataclass
class _Walking:
    """A walk and the index of its current stop."""

    walk: ExecutionTrace
    at: int = 0


def _steps(session: Session, begun: str) -> Iterable[str]:
    walking = _current(session)
    if begun.startswith("print ") and walking:
        return [f"print {name}" for name in walking.walk.stops[walking.at].in_scope]
    return _ACTIONS.values()


@command("step", "[next | into | out | back | to LAYER | print NAME | end]", complete=_steps, replayed=False)
def _step(session: Session, argument: str) -> Reply:
    """Step through the forward pass of the text, line by line.

    Each stop shows the lines of model.py that just ran, and the shapes, statistics and first elements of their results.
    next stays in the function, into enters a called function, out leaves the function, back goes back one stop, and to
    5 goes to layer 5. next 3 takes three steps. print q[0, -1, :, :8] shows elements of a variable in scope.

    On a terminal, /step alone reads single keys: Enter or n, i (or s, as in pdb), o, b, t 5, p q; ? lists them.
    """
    if not argument and session.screen.keyboard:
        return _with_keys(session, session.screen.keyboard)
    return _take(session, argument)


def _take(session: Session, argument: str) -> Reply:
    """Perform one action. The reply shows the resulting stop or the printed value."""
    from llama_scratch.microscope import execution

    word, rest = first_word(argument)
    word = _ACTIONS.get(word) or _SAME_AS_PDB.get(word, word)
    if word in _INSTEAD_OF_PDB:
        raise UsageError(f"/step has no '{word}'. {_INSTEAD_OF_PDB[word]}")
    if word not in ("", *_ACTIONS.values()):
        raise UsageError(f"Invalid action '{sanitize(argument)}' for /step. Use one of {', '.join(_ACTIONS.values())}.")
    if word == "end":
        session.update(walk=None)
        return note("The walk has ended.", ended=True)
    walking, begins = _walking(session)
    walk, at = walking.walk, walking.at
    if word == "print":
        with session.screen.progress() as progress:
            value = execution.look(session.llama, walk, at, rest, progress)
        return paged(session, merged({"stop": at}, value.as_json()), value_pages.page(value, walk.stops[at]))
    if word == "to":
        walking.at = walk.to(whole_number(rest, "the layer", least=0))
    elif word:
        count = whole_number(rest, "the number of steps") if rest else 1
        step = {"next": walk.next, "into": walk.step_into, "out": walk.step_out, "back": walk.back}[word]
        walking.at = step(at, count)
    stop = walk.stops[walking.at]
    place = {"stop": walking.at, "stops": len(walk.stops), "begins_anew": bool(begins)}
    return paged(session, merged(place, stop.as_json()), execution_pages.page(walk, walking.at, begins))


def _current(session: Session) -> _Walking | None:
    walking: _Walking | None = session.state.walk
    return walking


def _walking(session: Session) -> tuple[_Walking, str]:
    """Return the current walk, or start a new one.

    A new one is needed if the text or the network has changed.

    Returns:
        The walk, and a message if it replaces an earlier walk; otherwise "".
    """
    from llama_scratch.microscope import execution

    llama, ids, current = session.llama, session.ids, _current(session)
    if current and current.walk.fits(llama, ids):
        return current, ""
    with session.screen.progress() as progress:
        walking = _Walking(execution.walk(llama, ids, progress))
    session.update(walk=walking)
    return walking, "The text or the network has changed, so the walk starts again." if current else ""


class _Place:
    """A region of the screen in which each stop replaces the previous one.

    If the terminal is too short for a stop, or was resized, the next stop is printed below instead.

    Args:
        screen: The screen.
        in_place: Whether stops replace each other. If not, each one is printed below the previous one.
    """

    def __init__(self, screen: SessionScreen, *, in_place: bool):
        self._screen, self._in_place = screen, in_place
        self._stop: RenderableType = ""
        self._drawn: LiveRender | None = None
        self._size = screen.console.size

    def show_stop(self, view: RenderableType) -> None:
        """Show a stop."""
        self._stop = view
        self._draw(view, view)

    def show_below(self, view: RenderableType) -> None:
        """Show a message or numbers below the current stop, until the next stop."""
        self._draw(Group(self._stop, view), view)

    def _draw(self, whole: RenderableType, new: RenderableType) -> None:
        console = self._screen.console
        if not self._in_place:
            self._screen.show(new)
            return
        self._screen.record_view(new)
        # One row is reserved for the prompt.
        fits = self._size == console.size and self._drawn and self._drawn.last_render_height < console.size.height
        if fits and self._drawn:
            console.control(self._drawn.restore_cursor())
        elif self._drawn:
            whole = new
        self._drawn, self._size = LiveRender(whole, vertical_overflow="visible"), console.size
        console.print(self._drawn, markup=False, highlight=False)
        console.line()  # a LiveRender does not end its last line


def _with_keys(session: Session, keyboard: Keyboard) -> Reply:
    """Read single keys until q, Ctrl-C or Ctrl-D. The walk keeps its position."""
    # Imported here because a pipe does not need it.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import ColorDepth

    keys = KeyBindings()

    @Condition
    def empty() -> bool:
        return not get_app().current_buffer.text

    for key in "nisobq?":

        @keys.add(key, filter=empty)
        def _(event: KeyPressEvent) -> None:
            event.app.exit(result=event.data)

    plain = session.settings.plain
    editor: PromptSession[str] = PromptSession(
        input=keyboard.input,
        key_bindings=keys,
        erase_when_done=True,
        enable_suspend=True,
        color_depth=ColorDepth.DEPTH_1_BIT if session.screen.console.no_color or plain else None,
    )
    hint = FormattedText([("ansibrightblack", "Enter next, i into, o out, ? all")])
    reply = _take(session, "")
    place = _Place(session.screen, in_place=session.screen.console.is_terminal and not plain)
    place.show_stop(reply.view or "")
    while True:
        try:
            with keyboard.released():
                line = editor.prompt("step> ", placeholder=hint).strip()
        except (KeyboardInterrupt, EOFError):
            break
        if line in ("q", "end", "quit", "exit"):
            break
        if line == "?":
            place.show_below(reports.rows({"step>": _KEYS}))
            continue
        try:
            reply = _take(session, line or "next")
            show = place.show_stop if "stops" in reply.facts else place.show_below
            show(reply.view or "")
        except LlamaScratchError as error:
            place.show_below(text.error(str(error)))
    return Reply(reply.facts)
