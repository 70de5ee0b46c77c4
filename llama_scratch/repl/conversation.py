"""A conversation in a session. It lives in the session's text, so that every view of a text is one of it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

from llama_scratch.chat_format import Message

if TYPE_CHECKING:
    from llama_scratch.llama import Llama
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

    def messages(self, ids: list[int], tokenizer: Tokenizer) -> list[Message]:
        """The conversation that a text holds; a new one if it holds none, or a question alone."""
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
            self.questions.append(Question((*self.messages(ids, tokenizer), Message("user", line)), ids))

    def question(self, llama: Llama, ids: list[int], line: str) -> Question:
        """What the model would see if a line were the next message. Raises as `Llama.encode_chat` does."""
        messages = (*self.messages(ids, llama.tokenizer), Message("user", line))
        return Question(messages, llama.encode_chat(messages))


def checked(llama: Llama, system: str = "") -> Chat:
    """A new conversation. Raises `UsageError` if the model, or its format, takes none."""
    chat = Chat(system)
    chat.question(llama, [], "Hello")  # does not change anything
    return chat
