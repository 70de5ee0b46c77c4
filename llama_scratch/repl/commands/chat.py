"""/chat and /system: conversations with a chat model."""

from __future__ import annotations

from llama_scratch.render import text
from llama_scratch.repl.commands.arguments import on_or_off
from llama_scratch.repl.commands.registry import Reply, commands_under, note
from llama_scratch.repl.conversation import checked
from llama_scratch.repl.session import Session

command = commands_under("Chat")


@command("chat", "[on | off]", complete=lambda _session, _begun: ["on", "off"])
def _chat(session: Session, argument: str) -> Reply:
    """Chat with the model: each line is a message.

    Messages are encoded in the model's chat format.

    For all other commands, the text is the whole conversation with the tokens of the chat format: /undo removes an
    answer and then its question, /generate continues a truncated answer, and /clear starts a new conversation.
    """
    if argument and not on_or_off(argument, "/chat"):
        session.update(chat=None)
    elif session.state.chat is None:
        session.update(chat=checked(session.llama))
    return _status(session)


@command("system", "[TEXT | off]", complete=lambda _session, _begun: ["off"])
def _system(session: Session, argument: str) -> Reply:
    """Start a new conversation with this system prompt.

    off: use the default system prompt of the model's chat format, if it has one.
    """
    if argument:
        session.forget(chat=checked(session.llama, "" if argument == "off" else argument))
    return _status(session)


def _status(session: Session) -> Reply:
    if session.state.chat is None:
        sentence = "Chat is off: each line is a prompt."
        return note(sentence, chat=False)
    system = session.state.chat.system
    sentence = "Chat is on: each line is a message to the model" + (
        f", with the system prompt: {system}" if system else "."
    )
    return note(text.readable(sentence), chat=True, system=system)
