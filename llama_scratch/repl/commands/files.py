"""Files: the session saved and loaded, what stands on the screen exported, what was typed before."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from llama_scratch.errors import LlamaScratchError, UsageError, printable
from llama_scratch.render import terminal
from llama_scratch.render.lines import json_line
from llama_scratch.repl import record
from llama_scratch.repl.chat import Chat
from llama_scratch.repl.commands.registry import Reply, command, is_command, note, unescaped, whole_number
from llama_scratch.repl.session import Moment, Origin, Session
from llama_scratch.results import ModelInfo, as_json
from llama_scratch.tokenizer import replace_surrogates


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


@command("save", "FILE", complete=paths, replayed=False)
def _save(session: Session, argument: str) -> Reply:
    """Save what was typed and answered, with the model's checksum.

    'llama-scratch replay FILE' runs it again and reports every difference; /load FILE goes on from its end.
    """
    path = record.user_path(argument)
    recorded = record.record(session)
    record.save(recorded, path)
    turns = len(recorded.turns)
    sentence = f"Saved {turns} line{'s' if turns != 1 else ''} with their answers to {printable(path, 200)}."
    if not recorded.header.repeatable:
        sentence += "\n Text was drawn without a seed, which a replay cannot repeat; /seed N makes it repeatable."
    return note(sentence, path=str(path), turns=turns, repeatable=recorded.header.repeatable)


@command("load", "FILE", complete=paths, replayed=False)
def _load(session: Session, argument: str) -> Reply:
    """Go on from the end of a saved session.

    Its text, its settings and its lines take the place of the ones here. Changes to the network are no part of
    that end: those that are on, here or there, are off afterwards.
    """
    path = record.user_path(argument)
    recorded = record.load(path)
    header, llama = recorded.header, session.intact
    with session.progress() as progress:
        same = llama.path is None or header.end.model == record.weights_sha256(llama.path, progress)
    settings = replace(header.end.settings, plain=session.settings.plain, live=session.settings.live)
    answer = None
    # Another model has other tokens.
    ids = header.end.ids if same else session.encode(header.end.text) if header.end.text else []
    chat = None if header.end.system is None or not same else Chat(header.end.system)
    if chat:
        chat.recall(_asked(recorded), llama.tokenizer)
    if ids:
        with session.progress() as progress:  # which may refuse them, or be cancelled, while all is as it was
            answer = llama.predict(ids, top=settings.top, progress=progress)
    changed = session.labels or _changed_at_the_end(recorded)
    session.resume(
        [Moment(answer, (answer.next.id,))] if answer else [],
        settings=settings,
        chat=chat,
        turns=list(recorded.turns),
        first_settings=header.settings,
        first_system=header.system,
        first_model=_origin(header),
    )
    if answer and session.interactive:
        session.show_answer(answer, added=len(ids))
    turns = len(recorded.turns)
    sentence = f"Loaded {turns} line{'s' if turns != 1 else ''} with their answers from {printable(path, 200)}."
    if not same:
        sentence += (
            f"\n They are answers of another model, {printable(header.model.name)}; "
            f"from here on {llama.info.name} answers."
        )
    if changed:
        sentence += "\n Changes to the network are off."
    facts = {"path": str(path), "turns": turns, "same_model": same}
    return note(sentence, **facts, **(as_json(answer) if answer else {}))


def _asked(recorded: record.Record) -> list[tuple[str, list[int]]]:
    """What a session's chat was asked: each message with the ids that the model saw."""
    lines = [
        turn for turn in recorded.turns if "generated" in turn.output and turn.input and not is_command(turn.input)
    ]
    return [(unescaped(turn.input), ids) for turn in lines if (ids := record.ids_of(turn.output))]


def _changed_at_the_end(recorded: record.Record) -> bool:
    """Whether interventions were on."""
    return any([turn.output["interventions"] for turn in recorded.turns if "interventions" in turn.output][-1:])


def _origin(header: record.Header) -> Origin:
    model = header.model
    info = ModelInfo(model.name, model.format, header.precision, header.device, model.parameters)
    return Origin(info, Path(model.path), header.context, header.rope_factor)


# --- Exports ----------------------------------------------------------------------------------


@command("export", "FILE.html | .svg | .md | .json", complete=paths, replayed=False)
def _export(session: Session, argument: str) -> Reply:
    """Write what stands on the screen to a page, a picture or a text.

    FILE.html, .svg or .md; FILE.json has the lines and their answers.
    """
    path = record.user_path(argument)
    write = _EXPORTS.get(path.suffix.lower())
    if write is None:
        raise UsageError(f"'{printable(argument)}' was given for /export, expected a name in {', '.join(_EXPORTS)}.")
    if not (session.turns if path.suffix.lower() == ".json" else session.shown):
        raise UsageError("There is nothing to export yet, expected a prompt or a command before it.")
    if os.path.lexists(path):
        raise LlamaScratchError(f"{printable(path, 200)} is there already, so it stays as it is; choose another name.")
    record.write_whole(path, replace_surrogates(write(session)).encode())
    return note(f"Exported to {printable(path, 200)}.", path=str(path))


def _drawn(session: Session) -> Console:
    """The session's screen, drawn once more to be exported."""
    width = session.console.width
    console = Console(record=True, file=io.StringIO(), width=width)
    for view in session.shown:
        console.print(view, markup=False, highlight=False)
    return console


def _markdown(session: Session) -> str:
    text = "\n".join(line.rstrip() for line in _drawn(session).export_text().splitlines())
    # More backticks than stand in the text, so that nothing in it ends the block.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"


def _title(session: Session) -> str:
    return f"llama-scratch: {session.loading.name}"


_EXPORTS: dict[str, Callable[[Session], str]] = {
    ".html": lambda session: _drawn(session).export_html(inline_styles=True),
    ".svg": lambda session: _drawn(session).export_svg(title=_title(session)),
    ".md": _markdown,
    ".json": lambda session: json_line([vars(turn) for turn in session.turns]) + "\n",
}


# --- What was typed ---------------------------------------------------------------------------


@command("history", "[N]", replayed=False)
def _history(session: Session, argument: str) -> Reply:
    """The N lines that were typed last (20), the newest last.

    On a terminal those of earlier sessions too.
    """
    count = whole_number(argument, "/history") if argument else 20
    typed = _kept() if session.interactive else []
    typed = (typed or [turn.input for turn in session.turns if turn.input])[-count:]
    return Reply({"history": typed}, Group(*(Text(" " + terminal.readable(line)) for line in typed)))


def _kept() -> list[str]:
    """The lines of the history file, the oldest first; none where there is no such file to read."""
    from llama_scratch.repl.history import FileHistory, history_path

    try:
        return list(FileHistory(history_path()).load_history_strings())[::-1]
    except OSError:
        return []
