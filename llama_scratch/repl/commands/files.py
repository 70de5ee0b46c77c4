"""Files: the session saved and loaded, what stands on the screen exported, what was typed before."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.padding import Padding
from rich.text import Text

from llama_scratch.errors import CheckpointError, LlamaScratchError, UsageError, sanitize
from llama_scratch.render import text as terminal
from llama_scratch.render.lines import json_line
from llama_scratch.repl import recording, saved_model, session_file
from llama_scratch.repl.answering import show_answer
from llama_scratch.repl.commands.registry import Reply, command, is_command, note, unescaped, whole_number
from llama_scratch.repl.commands.text import unquoted
from llama_scratch.repl.conversation import Chat
from llama_scratch.repl.session import Session
from llama_scratch.repl.session_file import (
    SavedIntervention,
    SavedState,
    SavedStateExtension,
    SessionFile,
    SessionHeader,
    ids_of,
)
from llama_scratch.repl.state import Past
from llama_scratch.repl.transitions import resume
from llama_scratch.repl.user_files import user_path, write_whole
from llama_scratch.results import as_json
from llama_scratch.tokenizer import replace_surrogates

if TYPE_CHECKING:
    from llama_scratch.llama import Llama
    from llama_scratch.microscope.interventions import Intervention
    from llama_scratch.system.progress import Progress


def paths(_session: Session, begun: str) -> Iterator[str]:
    """What lies where a path begins, folders with a slash behind them."""
    folder, name = os.path.split(begun)
    try:
        found = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return
    for entry in found:
        hidden = entry.name.startswith(".") and not name.startswith(".")
        if entry.name.startswith(name) and entry.name.isprintable() and not hidden:
            yield os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")


def file_path(argument: str) -> Path:
    """The file that an argument names: as it is written, or in double quotes as JSON.

    Raises `UsageError` if it names a folder, or a home that there is not.
    """
    name = unquoted(argument)
    if name.endswith("/"):
        raise UsageError(f"'{sanitize(name)}' names a folder, expected a file; put its name behind the slash.")
    return user_path(name)


@command("save", "FILE", complete=paths, replayed=False)
def _save(session: Session, argument: str) -> Reply:
    """Save what was typed and answered, with the model's checksum.

    'llama-scratch replay FILE' runs it again and reports every difference; /load FILE goes on from its end.
    """
    path = file_path(argument)
    recorded = recording.record(session)
    session_file.save(recorded, path)
    turns = len(recorded.turns)
    sentence = f"Saved {turns} line{'s' if turns != 1 else ''} with their answers to {sanitize(path, 200)}."
    if not recorded.header.repeatable:
        sentence += "\nText was drawn without a seed, which a replay cannot repeat; /seed N makes it repeatable."
    return note(sentence, path=str(path), turns=turns, repeatable=recorded.header.repeatable)


@command("load", "FILE", complete=paths, replayed=False)
def _load(session: Session, argument: str) -> Reply:
    """Go on from the end of a saved session.

    Its text, its settings, its chat, the changes to its network and its lines take the place of the ones here. The
    model stays the one that is loaded here; if it is another one, the text is read anew, without chat and changes.
    """
    path = file_path(argument)
    recorded = session_file.load(path)
    header, llama = recorded.header, session.intact
    end, more = header.end, header.end.more
    # How this session was started holds for what is shown, unless a command changed it there.
    started = session.state.initial_settings
    live = end.settings.live if end.settings.live != header.settings.live else started.live
    settings = replace(end.settings, plain=session.settings.plain, live=live)
    with session.screen.progress() as progress:
        same = llama.path is None or saved_model.same_model(header, llama, progress)
        if same and more:
            changes = _remade(more.changes, llama, progress)
            texts, on = _texts(path, end, more, changes), _chosen(path, changes, more.on)
        else:
            # Another model has other tokens.
            ids = end.ids if same else llama.encode(end.text, special=settings.special) if end.text else []
            texts, on = [Past(ids, end.text, settings.top, None)] if ids else [], ()
    for id in {id for text in texts for id in (*text.ids, *(text.offered or ()))}:
        llama.token(id)  # raises for one that this model does not have
    chat = None
    if same and end.system is not None and llama.chat is not None:
        chat = Chat(end.system, list(more.questions) if more else [])
        if not more:
            chat.recall(_asked(recorded), llama.tokenizer)
    off = (session.state.labels and not on) or (not more and _changed(recorded))
    answer = resume(
        session,
        texts,
        on,
        settings=settings,
        chat=chat,
        turns=list(recorded.turns),
        initial_settings=replace(header.settings, plain=started.plain, live=started.live),
        initial_system=header.system,
        initial_model=saved_model.initial_model(header, llama if same and end.model == header.model.sha256 else None),
    )
    if answer and session.screen.interactive:
        show_answer(session, answer, added=len(answer.tokens))
    turns = len(recorded.turns)
    lines = [f"Loaded {turns} line{'s' if turns != 1 else ''} with their answers from {sanitize(path, 200)}."]
    lines += _model_notes(header, llama, same=same)
    if end.system is not None and chat is None:
        lines.append(
            f"Chat is off: {'its text is in the format of that model' if not same else 'this is a base model'}."
        )
    facts = {"path": str(path), "turns": turns, "same_model": same, "interventions": session.state.labels}
    if not same:
        facts["model_path"] = str(llama.path and llama.path.absolute())
    if off:
        lines.append("Changes to the network are off.")
    return note("\n".join(lines), **facts, **(as_json(answer) if answer else {}))


def _remade(changes: Sequence[SavedIntervention], llama: Llama, progress: Progress) -> list[Intervention]:
    """The interventions of a saved session, made again with this model."""
    from llama_scratch.microscope.interventions import remake

    return [replace(remake(llama, change.recipe, progress), label=sanitize(change.label)) for change in changes]


def _texts(path: Path, end: SavedState, more: SavedStateExtension, changes: Sequence[Intervention]) -> list[Past]:
    """The texts of a saved session, the newest last: as what `end` has, with as many candidates as its settings say."""
    texts = [
        Past(
            text.ids,
            text.prompt,
            max(1, text.top),
            None if text.offered is None else tuple(text.offered),
            _chosen(path, changes, text.changes),
        )
        for text in more.texts
    ]
    if not (texts and end.ids):
        return []
    return [*texts[:-1], replace(texts[-1], ids=end.ids, top=end.settings.top)]


def _chosen(path: Path, changes: Sequence[Intervention], numbers: Sequence[int]) -> tuple[Intervention, ...]:
    if not all(0 <= number < len(changes) for number in numbers):
        raise CheckpointError(
            f"{sanitize(path, 200)}, line 1: end: more: there is no change {sanitize(numbers)}, "
            "expected a session that /save wrote."
        )
    return tuple(changes[number] for number in numbers)


def _model_notes(header: SessionHeader, llama: Llama, *, same: bool) -> Iterator[str]:
    """Sentences on how the model here differs from the one that the saved session ended with."""
    model, details = header.at_end
    if not same:
        yield f"They are answers of another model, {sanitize(model.name)}; from here on {llama.info.name} answers."
        return
    if (precision := details.precision) and precision != llama.info.precision:
        shown = sanitize(precision)
        yield f"They ended in {shown}; from here on {llama.info.precision} answers. /precision {shown} changes that."
    for name, old, new in saved_model.shape_differences(details, llama):
        yield f"They were answered with {name} {old}, here it is {new}, so that answers differ."


def _asked(recorded: SessionFile) -> list[tuple[str, list[int]]]:
    """What a session's chat was asked: each message with the ids that the model saw."""
    lines = [
        turn for turn in recorded.turns if "generated" in turn.output and turn.input and not is_command(turn.input)
    ]
    return [(unescaped(turn.input), ids) for turn in lines if (ids := ids_of(turn.output))]


def _changed(recorded: SessionFile) -> bool:
    """Whether interventions were on at the end. Version 0.1.0 took them off at a /load, whose answer names none."""
    on = False
    for output in (turn.output for turn in recorded.turns):
        if "interventions" in output or output.get("command") == "load":
            on = bool(output.get("interventions"))
    return on


# --- Exports ----------------------------------------------------------------------------------


@command("export", "FILE.html | .svg | .md | .json", complete=paths, replayed=False)
def _export(session: Session, argument: str) -> Reply:
    """Write what stands on the screen to a page, a picture or a text.

    FILE.html, .svg or .md; FILE.json has the lines and their answers.
    """
    path = file_path(argument)
    write = _EXPORTS.get(path.suffix.lower())
    if write is None:
        raise UsageError(f"'{sanitize(argument)}' was given for /export, expected a name in {', '.join(_EXPORTS)}.")
    if not session.state.turns or not (session.screen.views or path.suffix.lower() == ".json"):
        raise UsageError("There is nothing to export yet; give a prompt or a command first.")
    if os.path.lexists(path):
        raise LlamaScratchError(f"{sanitize(path, 200)} is there already, so it stays as it is; choose another name.")
    write_whole(path, replace_surrogates(write(session)).encode())
    return note(f"Exported to {sanitize(path, 200)}.", path=str(path))


def _drawn(session: Session) -> Console:
    """The session's screen, drawn once more to be exported."""
    width = session.screen.console.width
    console = Console(record=True, file=io.StringIO(), width=width, emoji=False)
    for view in session.screen.views:
        console.print(view, markup=False, highlight=False)
    return console


def _markdown(session: Session) -> str:
    text = "\n".join(line.rstrip() for line in _drawn(session).export_text().splitlines())
    # More backticks than stand in the text, so that nothing in it ends the block.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"


def _title(session: Session) -> str:
    return f"llama-scratch: {session.state.loading.name}"


_EXPORTS: dict[str, Callable[[Session], str]] = {
    ".html": lambda session: _drawn(session).export_html(inline_styles=True),
    ".svg": lambda session: _drawn(session).export_svg(title=_title(session)),
    ".md": _markdown,
    ".json": lambda session: json_line([vars(turn) for turn in session.state.turns]) + "\n",
}


# --- What was typed ---------------------------------------------------------------------------


@command("history", "[N]", replayed=False)
def _history(session: Session, argument: str) -> Reply:
    """The N lines that were typed last (20), the newest last.

    On a terminal those of earlier sessions too.
    """
    count = whole_number(argument, "/history") if argument else 20
    typed = _kept() if session.screen.keyboard else []
    typed = (typed or [turn.input for turn in session.state.turns if turn.input])[-count:]
    return Reply(
        {"history": typed},
        Group(*(Padding(Text(terminal.readable(line)), (0, 0, 0, 1), expand=False) for line in typed)),
    )


def _kept() -> list[str]:
    """The lines of the history file, the oldest first; none where there is no such file to read."""
    from llama_scratch.repl.history import FileHistory, history_path

    try:
        return list(FileHistory(history_path()).load_history_strings())[::-1]
    except OSError:
        return []
