"""The session saved to a file, and loaded from one."""

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

command = commands_under("The session")


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
    # The options of this session apply to the display, unless a command changed it in the saved one.
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
            f"Chat is off: {'its text is in the format of that model' if not same else 'this is a base model'}."
        )
    facts = {"path": str(path), "turns": turns, "same_model": same, "interventions": session.state.labels}
    if not same:
        facts["model_path"] = str(llama.path and llama.path.absolute())
    if off:
        lines.append("Changes to the network are off.")
    return note("\n".join(lines), **facts, **(as_json(answer) if answer else {}))


def _chat(recorded: SessionFile, llama: Llama) -> Chat | None:
    """The conversation of a saved session; None if it had none, or the model takes none."""
    end = recorded.header.end
    if end.system is None or llama.chat is None:
        return None
    if end.more:
        return Chat(end.system, list(end.more.questions))
    chat = Chat(end.system)
    chat.recall(_asked(recorded), llama.tokenizer)
    return chat


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
        name = sanitize(precision)
        yield f"They ended in {name}; from here on {llama.info.precision} answers. /precision {name} changes that."
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
