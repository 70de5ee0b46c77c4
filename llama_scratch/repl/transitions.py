"""Steps that replace a session's state as a whole: another model or network, an earlier text, a loaded session.

Each computes everything first and then assigns the new state at once: if it fails, or is interrupted, the session
stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_scratch.errors import UsageError
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Past, Snapshot

if TYPE_CHECKING:
    from llama_scratch.inference.prompt_text import Prompt
    from llama_scratch.llama import Llama
    from llama_scratch.microscope.effect import Effect
    from llama_scratch.microscope.interventions import Intervention
    from llama_scratch.results import Prediction


# --- Another model, or a changed one ----------------------------------------------------------


def switch(session: Session, source: str | None, precision: str) -> Prediction | None:
    """Continue with another model, or with this one in another precision, and answer the text with it.

    Interventions stay on in another precision, and end with another model.

    Args:
        session: The session.
        source: The model's name or path; None for the same model.
        precision: How its weights are stored.

    Returns:
        The answer to the text; None if there is no text, or it is a complete chat.
    """
    state, old, now = session.state, session.intact, session.now
    interventions = state.interventions if source is None else ()
    with session.screen.progress() as progress:
        new = session.open(source or str(old.path), precision, progress)
        try:
            new.prepare(progress)
            changed = _changed(new, interventions)
            if now:  # another model has its own tokens
                prediction = (changed or new).predict(
                    now.ids if source is None else session.text_of(now.ids),
                    top=state.settings.top,
                    special=state.settings.special,
                    progress=progress,
                )
        except BaseException:
            new.close()
            raise
    state = replace(state, loading=Loading.ended_with(new), interventions=interventions, changed=changed)
    if source is not None:
        state = replace(state, snapshots=(), past=(), chat=None)  # another model has its own tokens and chat format
    if now:
        offered = (prediction.next.id,) if now.offered else ()  # nothing if a chat's answer is complete
        state = state.with_text(Snapshot(prediction, offered, interventions))
    session.state = state
    old.close()
    return prediction if now and now.offered else None


def intervene(session: Session, interventions: Sequence[Intervention]) -> Effect | None:
    """Let these changes to the network be on, and no others, and answer the text with them.

    Returns their effect on that answer; None if there is no text, or no intervention.
    """
    on = tuple(interventions)
    changed = _changed(session.intact, on)
    state, effect = replace(session.state, interventions=on, changed=changed, page=None), None
    if now := session.now:
        with session.screen.progress() as progress:
            prediction = (changed or session.intact).predict(now.ids, top=state.settings.top, progress=progress)
        effect = _effect(session, changed, on, now.ids) if changed else None
        state = state.with_text(Snapshot(prediction, (prediction.next.id,) if now.offered else (), on))
    session.state = state
    return effect


@contextmanager
def rollback_on_interrupt(session: Session) -> Iterator[None]:
    """Restore the session's state if Ctrl-C interrupts the block."""
    before = session.state
    try:
        yield
    except KeyboardInterrupt:
        session.state = before
        raise


def current_effect(session: Session) -> Effect:
    """The effect of the interventions on the answer to the text so far."""
    return _effect(session, session.llama, session.state.interventions, session.ids)


def _effect(session: Session, changed: Llama, on: Sequence[Intervention], ids: Sequence[int]) -> Effect:
    from llama_scratch.microscope.effect import effect

    labels = [intervention.label for intervention in on]
    with session.screen.progress() as progress:
        return effect(session.intact, changed, ids, labels, session.settings.top, progress)


def _changed(llama: Llama, interventions: Sequence[Intervention]) -> Llama | None:
    """The model with these interventions; None if there are none."""
    if not interventions:
        return None
    from llama_scratch.microscope.interventions import changed

    return changed(llama, interventions)


# --- An earlier text, or another session ------------------------------------------------------


def undo(session: Session) -> Snapshot:
    """Go back to the text before, and to the network that answered it. Raises `UsageError` if there is none."""
    state = session.state
    if (before := state.before) is None:
        raise UsageError("There is nothing to undo, expected an earlier text.")
    changed = state.changed
    if before.interventions != state.interventions:
        changed = _changed(session.intact, before.interventions)
    snapshots, past = state.snapshots[:-1], state.past
    if isinstance(before, Past):
        snapshots, past = (_answered(session, before, changed),), past[:-1]
    session.update(snapshots=snapshots, past=past, interventions=before.interventions, changed=changed, page=None)
    return snapshots[-1]


def answer_again(session: Session) -> None:
    """Answer the newest text again, with the number of candidates in the settings."""
    if now := session.now:
        past = Past(now.ids, now.prompt, session.settings.top, now.offered, now.interventions)
        snapshot = _answered(session, past, session.state.changed)
        session.update(snapshots=(*session.state.snapshots[:-1], snapshot))


def resume(
    session: Session, texts: Sequence[Past], interventions: Sequence[Intervention], **state: Any
) -> Prediction | None:
    """Replace a session's state by the state of another one.

    Args:
        session: The session.
        texts: The other session's texts, the newest last. The newest is answered at once.
        interventions: The changes to the network that are on from now on.
        state: Further fields of the state by their names.

    Returns:
        The answer to the newest text; None if there is none.
    """
    on = tuple(interventions)
    changed = _changed(session.intact, on)
    snapshots = tuple(_answered(session, text, changed) for text in texts[-1:])
    past = tuple(texts[:-1])
    session.update(**state, snapshots=snapshots, past=past, page=None, walk=None, interventions=on, changed=changed)
    return snapshots[-1].prediction if snapshots else None


def _answered(session: Session, past: Past, changed: Llama | None) -> Snapshot:
    """Answer a text of a loaded session by a changed network, or by the intact one if that is None."""
    llama = changed or session.intact
    with session.screen.progress() as progress:
        prediction = llama.predict(_prompt(session, past), top=past.top, progress=progress)
    offered = (prediction.next.id,) if past.offered is None else past.offered
    return Snapshot(prediction, offered, past.interventions)


def _prompt(session: Session, past: Past) -> Prompt:
    """A text as it was typed, for the same warnings, if it still has the same tokens; else its tokens."""
    return past.prompt if session.intact.encode(past.prompt) == past.ids else past.ids
