"""Conversations as a model was trained to read them: messages in, text and special tokens out, in its own format."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from llama_scratch.errors import CheckpointError, UsageError, printable

if TYPE_CHECKING:
    from llama_scratch.sandbox import Template

# Several times the longest template that models come with.
_MAX_TEMPLATE = 1 << 17


@dataclass(frozen=True)
class Message:
    """One message of a conversation. role: "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Part:
    """A piece of a conversation that becomes tokens by itself. special: names of special tokens in it are those."""

    text: str
    special: bool = False


class ChatFormat(Protocol):
    """How a model was trained to read conversations."""

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """A conversation up to where the assistant's next answer begins.

        Only what the format itself adds is ever special; what stands in a message is plain text.
        Raises `UsageError` where the format does not take these messages, and `CheckpointError` where it is broken.
        """


@dataclass(frozen=True)
class Llama3Format:
    """The format of Meta's Instruct models since Llama 3. Source: `ChatFormat` in llama-models."""

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """See `ChatFormat.parts`."""
        parts = [Part("<|begin_of_text|>", special=True)]
        for message in messages:
            parts += [*_header(message.role), Part(message.content), Part("<|eot_id|>", special=True)]
        return parts + _header("assistant")


def _header(role: str) -> list[Part]:
    return [
        Part("<|start_header_id|>", special=True),
        Part(role),
        Part("<|end_header_id|>", special=True),
        Part("\n\n"),
    ]


@dataclass(frozen=True)
class TemplateFormat:
    """A format as GGUF and Hugging Face files carry it: a template in the language Jinja.

    source: the template. bos, eos: the texts that it writes for the beginning and the end of a text.
    special: the names of all special tokens of the vocabulary.

    The template is a stranger's code: it runs in a sandbox, see `sandbox`, and is not looked at before it is used.
    """

    source: str
    bos: str = ""
    eos: str = ""
    special: Collection[str] = ()

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """See `ChatFormat.parts`."""
        typed = "".join(message.content for message in messages)
        # While the template runs, a character that nobody typed stands for each name of a special token in a
        # message; so the names that are found afterwards are the template's own.
        free = (char for char in map(chr, range(0xF0000, 0x110000)) if char not in typed)
        stand_ins = {name: next(free) for name in set(self._names.findall(typed))}
        names = {ord(char): name for name, char in stand_ins.items()}
        shown = [
            {"role": message.role, "content": self._names.sub(lambda match: stand_ins[match[0]], message.content)}
            for message in messages
        ]
        pieces = self._names.split(self._render(shown))  # plain, special, plain, …
        return [Part(piece.translate(names), special=i % 2 == 1) for i, piece in enumerate(pieces) if piece]

    @cached_property
    def _names(self) -> re.Pattern[str]:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")  # (?!) is found nowhere

    @cached_property
    def _template(self) -> Template:
        from llama_scratch.sandbox import Template  # Jinja, which only conversations need

        if len(self.source) > _MAX_TEMPLATE:
            raise CheckpointError(f"{len(self.source):,} characters, expected at most {_MAX_TEMPLATE:,}")
        return Template(self.source)

    def _render(self, messages: list[dict[str, str]]) -> str:
        from llama_scratch.sandbox import RefusalError

        try:
            # The variables that transformers gives.
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                bos_token=self.bos,
                eos_token=self.eos,
            )
        except RefusalError as error:
            raise UsageError(
                f"The model's chat template refuses this conversation ({_said(error)}), "
                "expected messages that it takes; leave out the system prompt, or begin anew."
            ) from error
        except Exception as error:  # a stranger's code raises what it likes
            raise CheckpointError(
                f"The model's chat template fails ({_said(error)}), expected one that makes a prompt of messages; "
                "use another file of this model, or use it without chat."
            ) from error


def _said(error: Exception) -> str:
    return printable(error, 100).rstrip(".") or type(error).__name__
