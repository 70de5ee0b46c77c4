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
    """A question in a chat: the conversation up to the start of the model's answer.

    Args:
        messages: The messages.
        ids: The token ids of the messages in the model's chat format.
    """

    messages: tuple[Message, ...]
    ids: list[int]


@dataclass
class Chat:
    """A conversation with a chat model.

    The current question and its answer are derived from the session's text. The conversation therefore stays up to date
    after /undo, /force, /generate and every other command that changes the text.

    Args:
        system: The system prompt; "" for the default of the chat format.
        questions: All questions so far, including those that /undo has removed from the text.
    """

    system: str = ""
    questions: list[Question] = field(default_factory=list)

    def messages(self, ids: list[int], tokenizer: Tokenizer) -> list[Message]:
        """Return the messages of the conversation that a text contains.

        Args:
            ids: The text's tokens.
            tokenizer: The model's tokenizer.

        Returns:
            The messages, without the last question if it is unanswered. If the text is not part of this conversation,
            only the system prompt, if there is one.
        """
        for question in reversed(self.questions):
            n = len(question.ids)
            if len(ids) > n and ids[:n] == question.ids:
                answer = takewhile(lambda id: id not in tokenizer.stop_ids, ids[n:])
                return [*question.messages, Message("assistant", tokenizer.decode(answer))]
            if ids == question.ids:  # unanswered: the next message replaces it
                return list(question.messages[:-1])
        return [Message("system", self.system)] if self.system else []

    def recall(self, asked: Sequence[tuple[str, list[int]]], tokenizer: Tokenizer) -> None:
        """Restore the questions of a saved session.

        Args:
            asked: The typed line and the token ids of each question, oldest first.
            tokenizer: The model's tokenizer.
        """
        for line, ids in asked:
            self.questions.append(Question((*self.messages(ids, tokenizer), Message("user", line)), ids))

    def question(self, llama: Llama, ids: list[int], line: str) -> Question:
        """Encode a line as the next message.

        Args:
            llama: The model.
            ids: The token ids of the text so far.
            line: The message.

        Returns:
            The question with the conversation before it.

        Raises:
            UsageError: If this is a base model, or its chat format does not accept the messages.
            ContextLengthError: If a long conversation has more tokens than the context.
            CheckpointError: If the model's chat template is broken.
        """
        messages = (*self.messages(ids, llama.tokenizer), Message("user", line))
        return Question(messages, llama.encode_chat(messages))


def checked(llama: Llama, system: str = "") -> Chat:
    """Start a new conversation after checking that the model supports it.

    Args:
        llama: The model.
        system: The system prompt; "" for the default of the chat format.

    Returns:
        The conversation.

    Raises:
        UsageError: If this is a base model, or its chat format does not accept the system prompt.
        ContextLengthError: If a long system prompt has more tokens than the context.
        CheckpointError: If the model's chat template is broken.
    """
    chat = Chat(system)
    chat.question(llama, [], "Hello")  # only checks the format
    return chat
