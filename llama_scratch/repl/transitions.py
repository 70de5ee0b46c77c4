"""Transitions of a session's state: switch model, intervene, undo, resume.

Each function first computes the whole new state and then assigns it in one step. If it fails or is interrupted, the
session keeps its old state.
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


# --- Another model or a changed network --------------------------------------------------------


def switch(session: Session, source: str | None, precision: str) -> Prediction | None:
    """Switch to another model or precision and recompute the prediction for the text.

    Interventions stay active in another precision, but not with another model.

    Args:
        session: The session.
        source: The model's name or path. None: the current model.
        precision: The precision of its weights.

    Returns:
        The new prediction. None if there is no text yet, or if it is a chat whose last answer is complete.
    """
    state, old, now = session.state, session.intact, session.now
    interventions = state.interventions if source is None else ()
    with session.screen.progress() as progress:
        new = session.open(source or str(old.path), precision, progress)
        try:
            new.prepare(progress)
            changed = _changed(new, interventions)
            if now:  # another model may have a different tokenizer
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
        state = replace(state, snapshots=(), past=(), chat=None)  # their tokens belong to the old model
    if now:
        offered = (prediction.next.id,) if now.offered else ()  # nothing to add if a chat's answer is complete
        state = state.with_text(Snapshot(prediction, offered, interventions))
    session.state = state
    old.close()
    return prediction if now and now.offered else None


def intervene(session: Session, interventions: Sequence[Intervention]) -> Effect | None:
    """Replace the active interventions and recompute the prediction for the text.

    Args:
        session: The session.
        interventions: The interventions that are active from now on.

    Returns:
        Their effect on the prediction. None without interventions or without a text.
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
    """Compute the effect of the active interventions on the prediction for the text."""
    return _effect(session, session.llama, session.state.interventions, session.ids)


def _effect(session: Session, changed: Llama, on: Sequence[Intervention], ids: Sequence[int]) -> Effect:
    from llama_scratch.microscope.effect import effect

    labels = [intervention.label for intervention in on]
    with session.screen.progress() as progress:
        return effect(session.intact, changed, ids, labels, session.settings.top, progress)


def _changed(llama: Llama, interventions: Sequence[Intervention]) -> Llama | None:
    """Return the model with these interventions, if any."""
    if not interventions:
        return None
    from llama_scratch.microscope.interventions import changed

    return changed(llama, interventions)


# --- An earlier text, or another session ------------------------------------------------------


def undo(session: Session) -> Snapshot:
    """Restore the previous text and its interventions.

    Raises:
        UsageError: If there is no previous text.
    """
    state = session.state
    if (before := state.before) is None:
        raise UsageError("There is nothing to undo. Enter another prompt first.")
    changed = state.changed
    if before.interventions != state.interventions:
        changed = _changed(session.intact, before.interventions)
    snapshots, past = state.snapshots[:-1], state.past
    if isinstance(before, Past):
        snapshots, past = (_answered(session, before, changed),), past[:-1]
    session.update(snapshots=snapshots, past=past, interventions=before.interventions, changed=changed, page=None)
    return snapshots[-1]


def answer_again(session: Session) -> None:
    """Recompute the newest answer with the current number of candidates."""
    if now := session.now:
        past = Past(now.ids, now.prompt, session.settings.top, now.offered, now.interventions)
        snapshot = _answered(session, past, session.state.changed)
        session.update(snapshots=(*session.state.snapshots[:-1], snapshot))


def resume(
    session: Session, texts: Sequence[Past], interventions: Sequence[Intervention], **state: Any
) -> Prediction | None:
    """Replace a session's state with the state of a saved session.

    Args:
        session: The session.
        texts: The saved session's texts, newest last. Only the newest one is answered now.
        interventions: The interventions that are active from now on.
        **state: Other fields of the state to replace.

    Returns:
        The prediction for the newest text, if there is one.
    """
    on = tuple(interventions)
    changed = _changed(session.intact, on)
    snapshots = tuple(_answered(session, text, changed) for text in texts[-1:])
    past = tuple(texts[:-1])
    session.update(**state, snapshots=snapshots, past=past, page=None, walk=None, interventions=on, changed=changed)
    return snapshots[-1].prediction if snapshots else None


def _answered(session: Session, past: Past, changed: Llama | None) -> Snapshot:
    """Compute the prediction for a text.

    Uses the changed network, or the unmodified one if it is None.
    """
    llama = changed or session.intact
    with session.screen.progress() as progress:
        prediction = llama.predict(_prompt(session, past), top=past.top, progress=progress)
    offered = (prediction.next.id,) if past.offered is None else past.offered
    return Snapshot(prediction, offered, past.interventions)


def _prompt(session: Session, past: Past) -> Prompt:
    """Return the typed text if it encodes to the same tokens, otherwise the tokens.

    The typed text produces the same warnings as before.
    """
    return past.prompt if session.intact.encode(past.prompt) == past.ids else past.ids
