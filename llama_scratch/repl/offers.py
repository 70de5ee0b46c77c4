"""What Enter would add to the text, and what the text so far would be as a typed line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llama_scratch.repl.session import Session


def offer(session: Session, ids: Sequence[int]) -> None:
    """Let Enter add these tokens to the text."""
    if session.now and ids:
        set_offer(session, ids)


def set_offer(session: Session, ids: Sequence[int]) -> None:
    """Replace what Enter adds to the newest text; by no tokens if it is complete."""
    *earlier, newest = session.state.snapshots
    session.update(snapshots=(*earlier, replace(newest, offered=tuple(ids))))


def offer_next(session: Session) -> None:
    """Let Enter add the next candidate of the last answer instead of the token that is offered."""
    if session.now:
        candidates = [candidate.id for candidate in session.now.prediction.top]
        ids = session.state.offered
        offered = ids[0] if len(ids) == 1 else None
        following = candidates.index(offered) + 1 if offered in candidates else 0
        offer(session, [candidates[following % len(candidates)]])


def offer_text(session: Session) -> str:
    """What Enter would add, as text."""
    return session.llama.tokenizer.decode(session.state.offered)


def continued_text(session: Session) -> str:
    """The text so far with the offered tokens, as a user could have typed it."""
    return session.text_of(session.ids) + typeable(session, session.state.offered)


def typeable(session: Session, ids: Sequence[int]) -> str:
    """Tokens as text that can be part of a prompt: without special tokens, "" for parts of characters."""
    tokenizer = session.llama.tokenizer
    text = tokenizer.decode(id for id in ids if id not in tokenizer.untypeable)
    return "" if "\ufffd" in text else text
