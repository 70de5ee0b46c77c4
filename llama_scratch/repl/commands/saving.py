"""/save and /load: session files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llama_scratch.errors import CheckpointError, sanitize
from llama_scratch.repl import recording, saved_model, session_file
from llama_scratch.repl.answering import show_answer
from llama_scratch.repl.commands.arguments import file_path, paths
from llama_scratch.repl.commands.registry import Reply, commands_under, is_command, note, unescaped
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
from llama_scratch.results import as_json
from llama_scratch.system.progress import Progress

if TYPE_CHECKING:
    from llama_scratch.llama import Llama
    from llama_scratch.microscope.interventions import Intervention

command = commands_under("Session")


@command("save", "FILE", complete=paths, replayed=False)
def _save(session: Session, argument: str) -> Reply:
    """Save the lines, their answers and the model's checksum.

    'llama-scratch replay FILE' replays the session and reports every difference. /load FILE continues from its end.
    """
    path = file_path(argument)
    recorded = recording.record(session)
    session_file.save(recorded, path)
    turns = len(recorded.turns)
    sentence = f"Saved {turns} line{'s' if turns != 1 else ''} with their answers to {sanitize(path, 200)}."
    if not recorded.header.repeatable:
        sentence += "\nText was sampled without a seed, so a replay cannot reproduce it. Set a seed with /seed N."
    return note(sentence, path=str(path), turns=turns, repeatable=recorded.header.repeatable)


@command("load", "FILE", complete=paths, replayed=False)
def _load(session: Session, argument: str) -> Reply:
    """Continue from the end of a saved session.

    Its text, settings, chat, interventions and lines replace the current ones. The current model stays loaded. If it
    differs from the saved one, the text is tokenized again, and the chat and interventions are dropped.
    """
    path = file_path(argument)
    recorded = session_file.load(path)
    header, llama = recorded.header, session.intact
    end, more = header.end, header.end.more
    # This session's display options take precedence, except that a /live in the saved session stays in effect.
    started = session.state.initial_settings
    live = end.settings.live if end.settings.live != header.settings.live else started.live
    settings = replace(end.settings, plain=session.settings.plain, live=live)
    with session.screen.progress() as progress:
        same = llama.path is None or saved_model.same_model(header, llama, progress)
        if same and more:
            changes = _remade(more.changes, llama, progress)
            texts, on = _texts(path, end, more, changes), _chosen(path, changes, more.on)
        else:
            # Another model may have a different tokenizer.
            ids = end.ids if same else llama.encode(end.text, special=settings.special) if end.text else []
            texts, on = [Past(ids, end.text, settings.top, None)] if ids else [], ()
    for id in {id for text in texts for id in (*text.ids, *(text.offered or ()))}:
        llama.token(id)  # raises an error if the model does not have this token
    chat = _chat(recorded, llama) if same else None
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
            f"Chat is off: {'the text is in the chat format of that model' if not same else 'this is a base model'}."
        )
    facts = {"path": str(path), "turns": turns, "same_model": same, "interventions": session.state.labels}
    if not same:
        facts["model_path"] = str(llama.path and llama.path.absolute())
    if off:
        lines.append("The interventions are off.")
    return note("\n".join(lines), **facts, **(as_json(answer) if answer else {}))


def _chat(recorded: SessionFile, llama: Llama) -> Chat | None:
    """Restore the conversation of a saved session.

    Returns:
        The conversation. None if the session did not end in a chat, or the model does not support chat.
    """
    end = recorded.header.end
    if end.system is None or llama.chat is None:
        return None
    if end.more:
        return Chat(end.system, list(end.more.questions))
    chat = Chat(end.system)
    chat.recall(_asked(recorded), llama.tokenizer)
    return chat


def _remade(changes: Sequence[SavedIntervention], llama: Llama, progress: Progress) -> list[Intervention]:
    """Recreate the interventions of a saved session with this model."""
    from llama_scratch.microscope.interventions import remake

    return [replace(remake(llama, change.recipe, progress), label=sanitize(change.label)) for change in changes]


def _texts(path: Path, end: SavedState, more: SavedStateExtension, changes: Sequence[Intervention]) -> list[Past]:
    """Restore the texts of a saved session, newest last.

    The newest text has the ids and the number of candidates of `end`.
    """
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
            f"{sanitize(path, 200)}, line 1: end: more: unknown intervention in {sanitize(numbers)}. "
            "Use a session file written by /save."
        )
    return tuple(changes[number] for number in numbers)


def _model_notes(header: SessionHeader, llama: Llama, *, same: bool) -> Iterator[str]:
    """Yield messages about differences between the current model and the saved one."""
    model, details = header.at_end
    if not same:
        yield f"The answers are from another model, {sanitize(model.name)}. From now on {llama.info.name} answers."
        return
    if (precision := details.precision) and precision != llama.info.precision:
        name = sanitize(precision)
        yield f"The saved precision is {name}, the current one {llama.info.precision}. Switch with /precision {name}."
    for name, old, new in saved_model.shape_differences(details, llama):
        yield f"The saved session had {name} {old}, this model has {new}. Answers differ."


def _asked(recorded: SessionFile) -> list[tuple[str, list[int]]]:
    """Return the messages of a session's chat with the token ids of each question."""
    lines = [
        turn for turn in recorded.turns if "generated" in turn.output and turn.input and not is_command(turn.input)
    ]
    return [(unescaped(turn.input), ids) for turn in lines if (ids := ids_of(turn.output))]


def _changed(recorded: SessionFile) -> bool:
    """Whether interventions were active at the end, according to the answers.

    Version 0.1.0 removed all interventions on /load, so its answer to /load does not list any.
    """
    on = False
    for output in (turn.output for turn in recorded.turns):
        if "interventions" in output or output.get("command") == "load":
            on = bool(output.get("interventions"))
    return on
