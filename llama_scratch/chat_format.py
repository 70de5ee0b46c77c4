"""Conversations as a model was trained to read them: messages in, text and special tokens out, in its own format."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from llama_scratch.errors import CheckpointError, ContextLengthError, UsageError, sanitize

if TYPE_CHECKING:
    from llama_scratch.system.template_process import TemplateProcess

# Several times the longest template that models come with.
_MAX_TEMPLATE = 1 << 17
# Characters of a conversation, as many as the template may write (`sandbox.MAX_SIZE`).
_MAX_CONVERSATION = 4_000_000


@dataclass(frozen=True)
class Message:
    """One message of a conversation. role: "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatSegment:
    """A piece of a conversation that becomes tokens by itself. special: names of special tokens in it are those."""

    text: str
    special: bool = False


class ChatFormat(Protocol):
    """How a model was trained to read conversations."""

    def parts(self, messages: Sequence[Message]) -> list[ChatSegment]:
        """A conversation up to where the assistant's next answer begins.

        Only the format's own text is ever special; a message is plain text.

        Raises:
            UsageError: If the format does not accept these messages.
            ContextLengthError: If they are longer than any context.
            CheckpointError: If the format is broken.
        """

    def close(self) -> None:
        """End the process that the format runs in, if it has one. The next `parts` starts it again."""


@dataclass(frozen=True)
class Llama3Format:
    """The format of Meta's Instruct models since Llama 3. Source: `ChatFormat` in llama-models."""

    def parts(self, messages: Sequence[Message]) -> list[ChatSegment]:
        """See `ChatFormat.parts`."""
        parts = [ChatSegment("<|begin_of_text|>", special=True)]
        for message in messages:
            parts += [*_header(message.role), ChatSegment(message.content), ChatSegment("<|eot_id|>", special=True)]
        return parts + _header("assistant")

    def close(self) -> None:
        """See `ChatFormat.close`: there is no process."""


def _header(role: str) -> list[ChatSegment]:
    return [
        ChatSegment("<|start_header_id|>", special=True),
        ChatSegment(role),
        ChatSegment("<|end_header_id|>", special=True),
        ChatSegment("\n\n"),
    ]


@dataclass(frozen=True)
class TemplateFormat:
    """A format that a model's files carry: a template in the language Jinja.

    The template is untrusted code. It runs in a process of its own, `template_sandbox`, and is not read before its use.

    Args:
        source: The template.
        bos: The text that it writes for the beginning of a text.
        eos: The text that it writes for the end of a text.
        special: The names of the vocabulary's special tokens.
    """

    source: str
    bos: str = ""
    eos: str = ""
    special: Collection[str] = ()

    def parts(self, messages: Sequence[Message]) -> list[ChatSegment]:
        """See `ChatFormat.parts`."""
        if (size := sum(len(message.content) for message in messages)) > _MAX_CONVERSATION:
            raise ContextLengthError(
                f"The conversation has {size:,} characters; at most {_MAX_CONVERSATION:,} fit into the chat template. "
                "Shorten it."
            )
        pieces = self._render([{"role": message.role, "content": message.content} for message in messages])
        return [ChatSegment(piece, special=i % 2 == 1) for i, piece in enumerate(pieces) if piece]

    def close(self) -> None:
        """See `ChatFormat.close`."""
        self._process.close()

    @cached_property
    def _process(self) -> TemplateProcess:
        from llama_scratch.system.template_process import TemplateProcess  # only conversations need it

        return TemplateProcess()

    def _render(self, messages: list[dict[str, str]]) -> list[str]:
        """The conversation's text: plain text and the template's own special tokens in turn."""
        from llama_scratch.system.template_errors import RefusalError, TemplateError

        # The variables that transformers gives.
        variables = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "bos_token": self.bos,
            "eos_token": self.eos,
        }
        try:
            if len(self.source) > _MAX_TEMPLATE:
                raise TemplateError(f"it has {len(self.source):,} characters, the limit is {_MAX_TEMPLATE:,}")
            return self._process.render(self.source, list(self.special), messages, variables)
        except RefusalError as error:
            raise UsageError(
                f"The model's chat template refuses this conversation ({_reason(error)}). "
                "Leave out the system prompt, or begin anew."
            ) from error
        except TemplateError as error:
            raise CheckpointError(
                f"The model's chat template fails ({_reason(error)}). "
                "Use another file of this model, or use it without chat."
            ) from error


def _reason(error: Exception) -> str:
    return sanitize(error, 100).rstrip(".")
