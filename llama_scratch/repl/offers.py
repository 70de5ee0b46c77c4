"""The tokens that Enter adds to the text, and tokens as text for the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llama_scratch.repl.session import Session


def offer(session: Session, ids: Sequence[int]) -> None:
    """Offer tokens: Enter adds them to the text.

    Args:
        session: The session.
        ids: The tokens. If empty, the current offer remains.
    """
    if session.now and ids:
        set_offer(session, ids)


def set_offer(session: Session, ids: Sequence[int]) -> None:
    """Replace the tokens that Enter adds to the newest text.

    Args:
        session: The session.
        ids: The tokens. Empty if the text is complete.
    """
    *earlier, newest = session.state.snapshots
    session.update(snapshots=(*earlier, replace(newest, offered=tuple(ids))))


def offer_next(session: Session) -> None:
    """Offer the next candidate of the last answer.

    The first candidate follows the last one. It is also next if the current offer is not a single candidate.
    """
    if session.now:
        candidates = [candidate.id for candidate in session.now.prediction.top]
        ids = session.state.offered
        offered = ids[0] if len(ids) == 1 else None
        following = candidates.index(offered) + 1 if offered in candidates else 0
        offer(session, [candidates[following % len(candidates)]])


def offer_text(session: Session) -> str:
    """Return the offered tokens as text."""
    return session.llama.tokenizer.decode(session.state.offered)


def continued_text(session: Session) -> str:
    """Return the text followed by the offered tokens, as a user could have typed it."""
    return session.text_of(session.ids) + typeable(session, session.state.offered)


def typeable(session: Session, ids: Sequence[int]) -> str:
    """Decode tokens for use in a prompt, without special and unused tokens.

    Args:
        session: The session.
        ids: The tokens.

    Returns:
        The text; "" if the tokens contain an incomplete character.
    """
    tokenizer = session.llama.tokenizer
    text = tokenizer.decode(id for id in ids if id not in tokenizer.untypeable)
    return "" if "\ufffd" in text else text
