"""The session itself: help and the end."""

from __future__ import annotations

from llama_scratch.render import reports
from llama_scratch.repl.commands.registry import COMMANDS, Reply, by_heading, commands_under, unknown_command
from llama_scratch.repl.live import is_live
from llama_scratch.repl.session import Session

command = commands_under("The session")

KEYS = {
    "Enter": "Answer the prompt; on an empty line accept what is offered.",
    "Tab, →": "Take the suggested token; on an empty line, bring the text back.",
    "Shift-Tab": "Suggest the next candidate in its place.",
    "Alt-Enter": "A line break within the prompt.",
    "Up, Down": "Earlier prompts. Ctrl-R searches them.",
    "Ctrl-T": "On an empty line: how surprising each token of the text was.",
    "Ctrl-C": "Clear the line, or cancel what is running.",
    "Ctrl-D": "Leave the session.",
    "//…": "A prompt that begins with a slash.",
}


@command("help", "[COMMAND]", complete=lambda _session, _begun: list(COMMANDS))
def _help(session: Session, argument: str) -> Reply:
    """List the commands and the keys, or explain one command."""
    if not argument:
        groups = {
            heading: {f"/{command.name}": command.summary for command in commands}
            for heading, commands in by_heading().items()
        }
        names = {name: summary for group in groups.values() for name, summary in group.items()}
        keys = _keys(session)
        return Reply({"commands": names, "keys": keys}, reports.groups(groups | {"Keys": keys}), note=True)
    name = argument.removeprefix("/")
    if (explained := COMMANDS.get(name)) is None:
        raise unknown_command(name)
    usage, text = explained.usage, explained.help
    return Reply({"usage": usage, "help": text}, reports.explained(usage, text), note=True)


def _keys(session: Session) -> dict[str, str]:
    """The keys, and what they do in the session's mode."""
    if session.screen.keyboard is None:  # lines come from a pipe
        return {"//…": KEYS["//…"]}
    keys = dict(KEYS)
    if not is_live(session):
        keys["Tab, →"] = "On an empty line, bring the text back."
        keys["Shift-Tab"] = "On an empty line, offer the next candidate."
    if session.state.chat:
        del keys["Tab, →"]
        keys["Enter"] = "Send the message; on an empty line accept what is offered."
    return keys


@command("quit")
def _quit(session: Session, _: str) -> None:
    """Leave the session."""
    session.ended = True
