"""/help and /quit."""

from __future__ import annotations

from llama_scratch.render import reports
from llama_scratch.repl.commands.registry import COMMANDS, Reply, by_heading, commands_under, unknown_command
from llama_scratch.repl.live import is_live
from llama_scratch.repl.session import Session

command = commands_under("Session")

# The commands that a new user should try first.
START_WITH = ("why", "lens", "attention", "ablate", "step")
KEYS = {
    "Enter": "Send the prompt. On an empty line, accept the offered tokens.",
    "Tab, →": "Accept the suggested token. Empty line: insert the text.",
    "Shift-Tab": "Suggest the next candidate.",
    "Alt-Enter": "Insert a line break.",
    "Up, Down": "Show earlier lines. Ctrl-R searches them.",
    "Ctrl-T": "On an empty line, show the surprisal of each token.",
    "Ctrl-C": "Clear the line, or cancel the running command.",
    "Ctrl-D": "Exit the session.",
    "//…": "Begin a prompt with a slash.",
}


@command("help", "[COMMAND]", complete=lambda _session, _begun: list(COMMANDS))
def _help(session: Session, argument: str) -> Reply:
    """List the commands and keys, or explain one command."""
    if not argument:
        groups = {
            heading: {f"/{command.name}": command.summary for command in commands}
            for heading, commands in by_heading().items()
        }
        names = {name: summary for group in groups.values() for name, summary in group.items()}
        keys = _keys(session)
        first = {"Start with": {f"/{name}": COMMANDS[name].summary for name in START_WITH}}
        return Reply({"commands": names, "keys": keys}, reports.Groups(first | groups | {"Keys": keys}), note=True)
    name = argument.removeprefix("/")
    if (explained := COMMANDS.get(name)) is None:
        raise unknown_command(name)
    usage, text = explained.usage, explained.help
    return Reply({"usage": usage, "help": text}, reports.explained(usage, text), note=True)


def _keys(session: Session) -> dict[str, str]:
    """Return the keys and their functions in the session's mode."""
    if session.screen.keyboard is None:  # lines come from a pipe
        return {"//…": KEYS["//…"]}
    keys = dict(KEYS)
    if not is_live(session):
        keys["Tab, →"] = "On an empty line, insert the text."
        keys["Shift-Tab"] = "On an empty line, offer the next candidate."
    if session.state.chat:
        del keys["Tab, →"]
        keys["Enter"] = "Send the message. On an empty line, accept the offered tokens."
    return keys


@command("quit")
def _quit(session: Session, _: str) -> None:
    """Exit the session."""
    session.ended = True
