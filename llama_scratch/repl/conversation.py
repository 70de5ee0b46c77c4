"""Chat conversations, stored as the session's text.

Every view of a text therefore also works in a chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

from llama_scratch.chat_format import Message

if TYPE_CHECKING:
    from llama_scratch.llama import Llama
    from llama_scratch.tokenizer import Tokenizer

# Maximum number of tokens in an answer, unless --generate sets it.
ANSWER = 512


@dataclass(frozen=True)
class Question:
    """A question in a chat: the conversation up to the model's answer.

    Args:
        messages: The messages.
        ids: The messages as token ids in the model's chat format.
    """

    messages: tuple[Message, ...]
    ids: list[int]


@dataclass
class Chat:
    """A conversation with a chat model.

    The session's text determines which question is current and what the answer was. The conversation therefore follows
    /undo, /force, /generate and every other command that changes the text.

    Args:
        system: The system prompt; "" for the default of the chat format.
        questions: All questions so far.
    """

    system: str = ""
    questions: list[Question] = field(default_factory=list)

    def messages(self, ids: list[int], tokenizer: Tokenizer) -> list[Message]:
        """Return the messages of the conversation that a text contains.

        Args:
            ids: The text's tokens.
            tokenizer: The model's tokenizer.

        Returns:
            The messages, without an unanswered last question. If the text is not part of this conversation, only the
            system prompt, if any.
        """
        for question in reversed(self.questions):
            n = len(question.ids)
            if len(ids) > n and ids[:n] == question.ids:
                answer = takewhile(lambda id: id not in tokenizer.stop_ids, ids[n:])
                return [*question.messages, Message("assistant", tokenizer.decode(answer))]
            if ids == question.ids:  # the next line replaces it
                return list(question.messages[:-1])
        return [Message("system", self.system)] if self.system else []

    def recall(self, asked: Sequence[tuple[str, list[int]]], tokenizer: Tokenizer) -> None:
        """Restore earlier questions.

        Args:
            asked: The typed line and the token ids of each question.
            tokenizer: The model's tokenizer.
        """
        for line, ids in asked:
            self.questions.append(Question((*self.messages(ids, tokenizer), Message("user", line)), ids))

    def question(self, llama: Llama, ids: list[int], line: str) -> Question:
        """Encode a line as the next message.

        Args:
            llama: The model.
            ids: The text so far.
            line: The message.

        Returns:
            The question with the conversation before it.

        Raises:
            UsageError: As `Llama.encode_chat`.
        """
        messages = (*self.messages(ids, llama.tokenizer), Message("user", line))
        return Question(messages, llama.encode_chat(messages))


def checked(llama: Llama, system: str = "") -> Chat:
    """Start a new conversation.

    Args:
        llama: The model.
        system: The system prompt; "" for the default of the chat format.

    Returns:
        The conversation.

    Raises:
        UsageError: If the model or its chat format does not support it.
    """
    chat = Chat(system)
    chat.question(llama, [], "Hello")  # only checks the format
    return chat
