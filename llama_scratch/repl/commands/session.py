"""The session itself: help, an empty screen, the end."""

from __future__ import annotations

from llama_scratch.render import text as terminal
from llama_scratch.repl.commands.registry import COMMANDS, Reply, command, unknown_command
from llama_scratch.repl.live import is_live
from llama_scratch.repl.session import Session

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


# What belongs together, in the order in which /help lists it.
GROUPS = {
    "The text": ("generate", "force", "undo", "edit", "clear", "context"),
    "Looking at it": ("tokens", "surprisal", "tree", "choices", "diff", "compare"),
    "Looking inside": ("lens", "attention", "why", "neurons", "step", "source"),
    "Changing it": ("ablate", "patch", "steer", "restore"),
    "The network": ("arch", "rope", "kv", "numerics"),
    "Drawing tokens": ("temperature", "top-k", "top-p", "min-p", "seed", "greedy"),
    "Chat": ("chat", "system"),
    "The model": ("info", "memory", "model", "precision"),
    "The session": ("top", "live", "special", "history", "save", "load", "export", "picture", "report", "help", "quit"),
}


@command("help", "[COMMAND]", complete=lambda _session, _begun: list(COMMANDS))
def _help(session: Session, argument: str) -> Reply:
    """List the commands and the keys, or explain one command."""
    if not argument:
        names = {f"/{found.name}": found.summary for found in COMMANDS.values()}
        groups = {title: {f"/{name}": names[f"/{name}"] for name in group} for title, group in GROUPS.items()}
        keys = _keys(session)
        return Reply({"commands": names, "keys": keys}, terminal.groups(groups | {"Keys": keys}), note=True)
    name = argument.removeprefix("/")
    if (found := COMMANDS.get(name)) is None:
        raise unknown_command(name)
    return Reply({"usage": found.usage, "help": found.help}, terminal.explained(found.usage, found.help), note=True)


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


@command("clear")
def _clear(session: Session, _: str) -> Reply:
    """Forget the text and empty the screen."""
    session.forget()
    session.screen.clear()
    return Reply({}, note=True)


@command("quit")
def _quit(session: Session, _: str) -> None:
    """Leave the session."""
    session.ended = True
