"""Answer typed lines, as prompts or as chat messages."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.text import Text

from llama_scratch.errors import ContextLengthError
from llama_scratch.render import answer as answers
from llama_scratch.render import text
from llama_scratch.repl.conversation import ANSWER, Chat
from llama_scratch.repl.offers import offer, set_offer
from llama_scratch.repl.session import Session
from llama_scratch.repl.transitions import current_effect
from llama_scratch.results import ENDS_IN_A_WORD, ENDS_IN_SPACE, Generated, as_json, merged
from llama_scratch.tokenizer import replace_surrogates

if TYPE_CHECKING:
    from llama_scratch.inference.prompt_text import Prompt
    from llama_scratch.results import Prediction, Step

# Options that make `Console.print` write a text verbatim.
_VERBATIM: dict[str, Any] = {"sep": "", "end": "", "soft_wrap": True}


# --- Prompts ----------------------------------------------------------------------------------


def say(session: Session, line: str) -> dict[str, Any]:
    """Answer a line: the next message in a chat, otherwise a prompt.

    Args:
        session: The session.
        line: The typed line.

    Returns:
        The answer's JSON object.
    """
    chat = session.state.chat
    return _say_in_chat(session, chat, line) if chat else ask(session, line)


def ask(session: Session, prompt: Prompt, added: int = 0) -> dict[str, Any]:
    """Predict the next token of a prompt, and generate text if the settings say so.

    The prompt becomes the session's text. On a terminal, also shows the answer.

    Args:
        session: The session.
        prompt: The prompt.
        added: Number of tokens at its end that were added to the previous text.

    Returns:
        The answer's JSON object.
    """
    prediction = session.predict(prompt)
    if session.screen.interactive:
        explain(session, prediction, added)
    changes = _changes(session)
    count = session.settings.generate
    generated = generate(session, count) if count else None
    return merged(as_json(prediction, generated), changes)


def extend(session: Session, ids: Sequence[int]) -> dict[str, Any]:
    """Append tokens to the text and answer it.

    Args:
        session: The session.
        ids: The new tokens.

    Returns:
        The answer's JSON object.
    """
    return ask(session, [*session.ids, *ids], added=len(ids))


def _changes(session: Session) -> dict[str, Any]:
    """Compute the effect of the active interventions, and show it on a terminal.

    Returns:
        The effect's field of the answer's JSON object; empty if no interventions are active.
    """
    if not session.state.interventions:
        return {}
    effect = current_effect(session)
    if session.screen.interactive:
        session.screen.show(answers.before_and_after(effect))
    return {"effect": effect.as_json()}


def show_answer(session: Session, prediction: Prediction, added: int = 0) -> None:
    """Show an answer, below the text if tokens were added to it.

    Args:
        session: The session.
        prediction: The answer.
        added: Number of tokens that were added at the end of the text.
    """
    width = session.screen.console.width
    if added:
        ids = [token.id for token in prediction.tokens]
        old, new = session.text_of(ids[:-added]), session.llama.tokenizer.decode(ids[-added:])
        session.screen.show(answers.context(old, new, width))
    plain = session.settings.plain
    session.screen.show(answers.plain_answer(prediction) if plain else answers.answer(prediction))


def explain(session: Session, prediction: Prediction, added: int = 0) -> None:
    """Show an answer with its warnings.

    Each kind of warning is shown only once per session. A warning about a trailing space or an incomplete word is
    followed by the prediction without the last token.

    Args:
        session: The session.
        prediction: The answer.
        added: Number of tokens that were added at the end of the text.
    """
    explained = session.screen.explained
    fresh = tuple(warning for warning in prediction.warnings if warning.cause not in explained)
    show_answer(session, replace(prediction, warnings=fresh), added)
    if len(session.ids) > 1 and any(warning.cause in (ENDS_IN_SPACE, ENDS_IN_A_WORD) for warning in fresh):
        without = session.llama.predict(session.ids[:-1], top=1)
        session.screen.show(answers.effect(prediction.next, without.next))
    explained.update(warning.cause for warning in fresh)


# --- A chat -----------------------------------------------------------------------------------


def _say_in_chat(session: Session, chat: Chat, line: str) -> dict[str, Any]:
    """Send a line as the next chat message and generate the answer.

    The answer is streamed if the session is interactive. The session's text first becomes the question, and then the
    question with the answer. /undo can therefore remove the answer without the question.

    Returns:
        The answer's JSON object. `tokens` and `next` describe the question, `generated` describes the answer.

    Raises:
        ContextLengthError: If the conversation leaves no room for an answer.
    """
    llama, screen = session.llama, session.screen
    question = chat.question(llama, session.now.ids if session.now else [], line)
    if len(question.ids) >= llama.context:
        raise ContextLengthError(
            f"The conversation has {len(question.ids):,} tokens with this message. The context is "
            f"{llama.context:,}, which leaves no room for an answer. Start a new conversation with /clear."
        )
    before = session.predict(question.ids)
    before = replace(
        before,
        prompt=replace_surrogates(line),
        warnings=(*before.warnings, *llama.tokenizer.warnings(line, special=True)),
    )
    chat.questions.append(question)
    if screen.interactive:
        for warning in before.warnings:
            if warning not in screen.explained:  # already shown: a warning about the model
                screen.show(text.warning(warning))
        screen.explained.update(llama.warnings)
    changes = _changes(session)  # before generating: the effect on the answer's first token
    answer = generate(session, session.settings.generate or ANSWER)
    if answer.ids:
        session.predict([*question.ids, *answer.ids])
    if answer.finish_reason == "stop":  # the answer is complete, so there is nothing to offer
        set_offer(session, ())
    return merged(as_json(before, answer), changes)


# --- Generated text ---------------------------------------------------------------------------


def generate(session: Session, count: int) -> Generated:
    """Generate a continuation of the text and offer its tokens.

    The continuation is streamed if the session is interactive.

    Args:
        session: The session.
        count: Maximum number of tokens.

    Returns:
        The generated text.
    """
    if session.screen.interactive:
        generated = _stream(session, session.ids, count)
    else:
        generated = session.llama.complete(session.ids, count, session.settings.sampling)
    offer(session, generated.ids)
    return generated


def _stream(session: Session, ids: Sequence[int], count: int) -> Generated:
    """Stream a continuation. Ctrl-C stops it and keeps the tokens so far."""
    steps: list[Step] = []
    console = session.screen.console
    begin = Text(" " if session.state.chat else " …", style="dim")
    # Word wrap may erase a partial word and print it again on the next line. A screen reader would read it twice, and
    # a dumb terminal cannot erase.
    wraps = not (session.settings.plain or console.is_dumb_terminal)
    words = text.Wrapped(console.width if wraps else sys.maxsize, begin.plain, indent=" ")

    def write(added: str, *, final: bool = False) -> None:
        written = words.resize(console.width) if wraps else []
        written += words.push(text.readable(added), final=final)
        if written:
            console.print(*written, **_VERBATIM)

    console.print(begin, **_VERBATIM)
    reason = "length"
    start = time.perf_counter()
    try:
        for step in session.llama.continuation(ids, count, session.settings.sampling):
            steps.append(step)
            write(step.text)
        if len(steps) < min(count, session.llama.context - len(ids)):
            reason = "stop"
    except KeyboardInterrupt:
        reason = "interrupted"
    write("", final=True)
    console.print(Text("  stopped" if reason == "interrupted" else "", style="dim") + "\n")
    session.screen.record_view(Text.assemble(begin, words.text.removeprefix(begin.plain)))
    new = tuple(step.id for step in steps)
    return Generated(
        text=session.llama.tokenizer.decode(new),
        ids=new,
        logprobs=tuple(step.logprob for step in steps),
        finish_reason=reason,
        decode_s=time.perf_counter() - start,
    )
