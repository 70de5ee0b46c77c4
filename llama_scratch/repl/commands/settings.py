"""/top, /live, /special: settings for answers and prompts."""

from __future__ import annotations

from llama_scratch.repl.commands.arguments import on_or_off, whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under, note
from llama_scratch.repl.live import why_not_live
from llama_scratch.repl.session import Session

command = commands_under("Session")


@command("top", "[N]")
def _top(session: Session, argument: str) -> Reply:
    """Show N candidates with each answer."""
    if argument:
        session.change_settings(top=whole_number(argument, "/top"))
        session.lists_candidates = True
    answer = "Each answer outside the chat" if session.state.chat else "Each answer"
    return note(f"{answer} shows {session.settings.top} candidates.", top=session.settings.top)


def _on_off(_session: Session, _begun: str) -> list[str]:
    return ["on", "off"]


@command("live", "[on | off]", _on_off)
def _live(session: Session, argument: str) -> Reply:
    """Predict the next token while you type.

    The more surprising a token of the line, the stronger its color, in steps at 1, 4 and 8 bits. The most probable next
    token is suggested after the cursor and shown on the bottom line. Not available in a chat or with --plain.
    """
    if argument:
        session.change_settings(live=on_or_off(argument, "/live"))
    state = "on" if session.settings.live else "off"
    sentence = f"Live prediction is {state}."
    if reason := why_not_live(session):
        sentence = f"Live prediction is {state}, but not available {reason}."
    return note(sentence, live=session.settings.live)


@command("special", "[on | off]", _on_off)
def _special(session: Session, argument: str) -> Reply:
    """Parse names such as <|eot_id|> in prompts as special tokens.

    off (the default): read them as plain text.
    """
    if argument:
        session.change_settings(special=on_or_off(argument, "/special"))
    kind = "special tokens" if session.settings.special else "plain text"
    return note(f"Special token names in prompts are read as {kind}.", special=session.settings.special)
