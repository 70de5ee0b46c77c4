"""Commands on the text: generate, force, undo, edit, clear, context."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from rich.text import Text

from llama_scratch.errors import LlamaScratchError, UsageError, sanitize
from llama_scratch.render import reports
from llama_scratch.render.text import readable
from llama_scratch.repl import transitions
from llama_scratch.repl.answering import ask, extend, generate, show_answer
from llama_scratch.repl.commands.arguments import candidates, one_token, whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under, note
from llama_scratch.repl.session import Session
from llama_scratch.results import as_json
from llama_scratch.system.small_files import read_bytes, without_line_end, without_mark

command = commands_under("Text")

# Maximum size of an edited text in bytes. A longer text would not fit into any context.
_MAX_TEXT = 1 << 24


@command("generate", "[N]", complete=lambda _session, _begun: ["20", "50", "100", "200"])
def _generate(session: Session, argument: str) -> Reply | None:
    """Generate N tokens (default 20); Ctrl-C stops and keeps them.

    Uses the sampling options, such as /temperature. Enter then adds the tokens to the text.
    """
    generated = generate(session, whole_number(argument, "/generate") if argument else 20)
    # Streamed text is already on the screen.
    return Reply(generated.as_json(), None if session.screen.interactive else Text(generated.text))


@command("force", "TOKEN", complete=candidates)
def _force(session: Session, argument: str) -> Reply | None:
    """Append a token of your choice: ␣Paris, " Paris" or #7042."""
    token = one_token(session, argument)
    return Reply(extend(session, [token.id]))


@command("undo")
def _undo(session: Session, _: str) -> Reply:
    """Go back to the previous text and its prediction."""
    snapshot = transitions.undo(session)
    if session.screen.interactive:
        show_answer(session, snapshot.prediction, added=len(snapshot.ids))
    return Reply(as_json(snapshot.prediction))


@command("edit", replayed=False)
def _edit(session: Session, _: str) -> Reply | None:
    """Edit the text in $EDITOR, then answer it."""
    if session.screen.keyboard is None:
        raise UsageError("/edit needs a terminal. Enter the whole text as a prompt instead.")
    if session.state.chat:
        raise UsageError(
            "/edit does not work in a chat, whose text contains the chat format. End the chat with /chat off."
        )
    before = session.text_of(session.ids) if session.now else ""
    with session.screen.keyboard.given_away():
        after = _edited(before)
    if not after or after == before:
        return note("The text is unchanged.")
    return Reply(ask(session, after))


def _edited(text: str) -> str:
    wanted = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        editor = shlex.split(wanted)
    except ValueError as error:
        raise LlamaScratchError(
            f"$EDITOR is '{sanitize(wanted)}', which has unbalanced quotes. Set it to a valid command."
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.txt"
        path.write_text(text, encoding="utf-8")
        try:
            code = subprocess.run([*editor, str(path)], check=False).returncode
        except OSError as error:
            raise LlamaScratchError(
                f"The editor '{sanitize(shlex.join(editor))}' cannot be run ({error.strerror}). Change $EDITOR."
            ) from error
        if code:
            raise LlamaScratchError(f"The editor exited with code {code}. The text is unchanged.")
        try:
            data = read_bytes(path, _MAX_TEXT, error=LlamaScratchError, any_content=True)
        except OSError as error:
            raise LlamaScratchError("The editor deleted the file. The text is unchanged.") from error
        after = without_mark(data, "The edited text", LlamaScratchError).decode("utf-8", errors="replace")
        return without_line_end(after)  # editors add a final line break


@command("clear")
def _clear(session: Session, _: str) -> Reply:
    """Discard the text and clear the screen."""
    session.forget()
    session.screen.clear()
    return Reply({}, note=True)


@command("context", replayed=False)
def _context(session: Session, _: str) -> Reply:
    """Show the text, its tokens, the context and cached tokens."""
    llama = session.llama
    ids = session.ids if session.now else []
    facts = {
        "text": session.text_of(ids),
        "tokens": len(ids),
        "context": llama.context,
        "trained_for": llama.args.max_seq_len,
        "cached": llama.engine.cached_tokens,
    }
    rows = {
        "text": readable(session.text_of(ids)) or "(none yet)",
        "tokens": f"{len(ids):,} of a context of {llama.context:,}; trained for {llama.args.max_seq_len:,}",
        "cached": f"{llama.engine.cached_tokens:,} tokens",
    }
    return Reply(facts, reports.rows(rows))
