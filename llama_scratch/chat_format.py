"""Chat formats: convert messages to the text and tokens that a model expects."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from llama_scratch.errors import CheckpointError, ContextLengthError, UsageError, sanitize

if TYPE_CHECKING:
    from llama_scratch.system.template_process import TemplateProcess

# Maximum characters of a template: several times the longest published one.
_MAX_TEMPLATE = 1 << 17
# Maximum characters of a conversation. The output of a template has the same limit (`template_sandbox.MAX_SIZE`).
_MAX_CONVERSATION = 4_000_000


@dataclass(frozen=True)
class Message:
    """One message of a conversation. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatSegment:
    """A piece of a conversation that is tokenized separately.

    Attributes:
        text: The piece.
        special: Whether to parse names of special tokens in it, such as `<|eot_id|>`.
    """

    text: str
    special: bool = False


class ChatFormat(Protocol):
    """The format of conversations that a model was trained on."""

    def parts(self, messages: Sequence[Message]) -> list[ChatSegment]:
        """Format a conversation up to the beginning of the assistant's next answer.

        Special tokens come only from the format itself. Messages are plain text.

        Raises:
            UsageError: If the format does not accept these messages.
            ContextLengthError: If the messages are longer than any context.
            CheckpointError: If the model's chat template fails.
        """

    def close(self) -> None:
        """End the process that runs the format, if any.

        The next call of `parts` starts it again.
        """


@dataclass(frozen=True)
class Llama3Format:
    """The format of Meta's Instruct models since Llama 3.

    Source: `ChatFormat` in llama-models.
    """

    def parts(self, messages: Sequence[Message]) -> list[ChatSegment]:
        """See `ChatFormat.parts`."""
        parts = [ChatSegment("<|begin_of_text|>", special=True)]
        for message in messages:
            parts += [*_header(message.role), ChatSegment(message.content), ChatSegment("<|eot_id|>", special=True)]
        return parts + _header("assistant")

    def close(self) -> None:
        """See `ChatFormat.close`. This format has no process."""


def _header(role: str) -> list[ChatSegment]:
    return [
        ChatSegment("<|start_header_id|>", special=True),
        ChatSegment(role),
        ChatSegment("<|end_header_id|>", special=True),
        ChatSegment("\n\n"),
    ]


@dataclass(frozen=True)
class TemplateFormat:
    """A Jinja chat template from a model's files.

    The template is untrusted code. It runs in a separate process (`template_sandbox`), and is not parsed before use.

    Args:
        source: The template.
        bos: The value of the template's variable `bos_token`.
        eos: The value of the template's variable `eos_token`.
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
                f"The conversation has {size:,} characters; the limit is {_MAX_CONVERSATION:,}. "
                "Shorten it, or start a new conversation."
            )
        pieces = self._render([{"role": message.role, "content": message.content} for message in messages])
        return [ChatSegment(piece, special=i % 2 == 1) for i, piece in enumerate(pieces) if piece]

    def close(self) -> None:
        """See `ChatFormat.close`."""
        self._process.close()

    @cached_property
    def _process(self) -> TemplateProcess:
        from llama_scratch.system.template_process import TemplateProcess  # only needed for conversations

        return TemplateProcess()

    def _render(self, messages: list[dict[str, str]]) -> list[str]:
        """Render a conversation to plain text and special tokens, alternating."""
        from llama_scratch.system.template_errors import RefusalError, TemplateError

        # The variables that transformers passes to templates.
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
                f"The model's chat template rejects this conversation ({_reason(error)}). "
                "Leave out the system prompt, or start a new conversation."
            ) from error
        except TemplateError as error:
            raise CheckpointError(
                f"The model's chat template fails ({_reason(error)}). "
                "Use another file of this model, or use the model without chat."
            ) from error


def _reason(error: Exception) -> str:
    return sanitize(error, 100).rstrip(".")
