"""What each answer shows, and how a prompt is read."""

from __future__ import annotations

from llama_scratch.repl.commands.arguments import on_or_off, whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under, note
from llama_scratch.repl.live import why_not_live
from llama_scratch.repl.session import Session

command = commands_under("The session")


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
    """Predict while you type.

    The tokens of the line are colored by how much they surprise the model: green what it expected (under 1 bit),
    magenta what surprised it (4 bits), bold red what surprised it much (8 bits). The bottom line has the best next
    token, which is suggested after the cursor too. Not in a chat and not with --plain.
    """
    if argument:
        session.change_settings(live=on_or_off(argument, "/live"))
    state = "on" if session.settings.live else "off"
    sentence = f"Live prediction is {state}."
    if reason := why_not_live(session):
        sentence = f"There is no live prediction {reason}. Elsewhere it is {state}."
    return note(sentence, live=session.settings.live)


@command("special", "[on | off]", _on_off)
def _special(session: Session, argument: str) -> Reply:
    """Read <|eot_id|> and the like in a prompt as special tokens.

    off: as plain text, which is how it begins.
    """
    if argument:
        session.change_settings(special=on_or_off(argument, "/special"))
    kind = "special tokens" if session.settings.special else "plain text"
    return note(f"Names of special tokens in a prompt are {kind}.", special=session.settings.special)
