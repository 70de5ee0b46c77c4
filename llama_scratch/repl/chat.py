"""A conversation in a session. It lives in the session's text, so that every view of a text is one of it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from llama_scratch.chat import Message
from llama_scratch.errors import ContextLengthError
from llama_scratch.render import terminal
from llama_scratch.results import as_json
from llama_scratch.tokenizer import replace_surrogates

if TYPE_CHECKING:
    from llama_scratch.repl.session import Session
    from llama_scratch.tokenizer import Tokenizer

# Tokens that an answer may have where --generate says nothing.
ANSWER = 512


@dataclass(frozen=True)
class Question:
    """What the model was asked: the conversation up to its answer, as messages and as the ids that it saw."""

    messages: tuple[Message, ...]
    ids: list[int]


@dataclass
class Chat:
    """A conversation with a model that was trained for it. system: the system prompt, "" for what the format has.

    questions: all that were asked. Which of them the conversation goes on from, and what the answer was, the
    session's text says: so it follows /undo, /force, /generate and whatever else changes that.
    """

    system: str = ""
    questions: list[Question] = field(default_factory=list)

    def messages(self, session: Session) -> list[Message]:
        """The conversation that the session's text holds; a new one where it holds none, or a question alone."""
        return self._known(session.now.ids if session.now else [], session.llama.tokenizer)

    def _known(self, ids: list[int], tokenizer: Tokenizer) -> list[Message]:
        """The conversation that a text holds which begins with a question."""
        for question in reversed(self.questions):
            n = len(question.ids)
            if len(ids) > n and ids[:n] == question.ids:
                answer = takewhile(lambda id: id not in tokenizer.stop_ids, ids[n:])
                return [*question.messages, Message("assistant", tokenizer.decode(answer))]
            if ids == question.ids:  # which the next line replaces
                return list(question.messages[:-1])
        return [Message("system", self.system)] if self.system else []

    def recall(self, asked: Sequence[tuple[str, list[int]]], tokenizer: Tokenizer) -> None:
        """Know questions that were asked before: the line that was typed and the ids that the model saw, of each."""
        for line, ids in asked:
            self.questions.append(Question((*self._known(ids, tokenizer), Message("user", line)), ids))

    def question(self, session: Session, line: str) -> Question:
        """What the model would see if a line were the next message. Raises as `Llama.encode_chat` does."""
        messages = (*self.messages(session), Message("user", line))
        return Question(messages, session.llama.encode_chat(messages))

    def say(self, session: Session, line: str) -> dict[str, Any]:
        """Take a line as the next message and let the model answer; shown as it comes where a person watches.

        Returns the object of the answer: `tokens` and `next` are those before it, `generated` is the answer. The
        session's text becomes the question, and then the question with the answer: /undo takes back either.
        """
        llama = session.llama
        question = self.question(session, line)
        if len(question.ids) >= llama.context:
            raise ContextLengthError(
                f"The conversation has {len(question.ids):,} tokens with this message, expected under "
                f"{llama.context:,}, so that there is room for an answer; /clear begins a new one."
            )
        before = session.predict(question.ids)
        before = replace(
            before,
            prompt=replace_surrogates(line),
            warnings=(*before.warnings, *llama.tokenizer.warnings(line, special=True)),
        )
        self.questions.append(question)
        if session.interactive:
            for sentence in before.warnings:
                if sentence not in session.explained:  # about the model, and shown before
                    session.show(terminal.warning(sentence))
            session.explained.update(llama.warnings)
        changes = session.changes()  # of the answer's first token
        answer = session.generate(session.settings.generate or ANSWER)
        if answer.ids:
            session.predict([*question.ids, *answer.ids])
        if answer.finish_reason == "stop":  # it is complete, so Enter has nothing to add
            session.moments = [*session.moments[:-1], replace(session.moments[-1], offered=())]
        return as_json(before, answer) | changes


def begin(session: Session, system: str = "") -> Chat:
    """Start a conversation in a session. Raises as `checked` does."""
    session.chat = chat = checked(session, system)
    return chat


def checked(session: Session, system: str) -> Chat:
    """A new conversation. Raises `UsageError` if the session's model, or the model's format, takes none."""
    chat = Chat(system)
    chat.question(session, "Hello")  # does not change anything
    return chat
