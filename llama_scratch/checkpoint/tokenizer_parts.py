"""What the other forms' files say of a tokenizer: tokens as visible characters, merges, names, the chat template."""

from __future__ import annotations

from dataclasses import dataclass

from llama_scratch.chat import ChatFormat, Llama3Format, TemplateFormat
from llama_scratch.checkpoint.base import Checkpoint
from llama_scratch.checkpoint.vocabulary import PATTERNS, bytes_to_unicode, merges_of
from llama_scratch.errors import CheckpointError, printable

# `Llama3Format` in the language of templates.
LLAMA3_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif %}"
)


@dataclass(frozen=True)
class TokenizerParts:
    """A tokenizer as Hugging Face and GGUF files hold it.

    texts: id → text, ordinary tokens in GPT-2's alphabet. special: ids of special tokens. pattern: its name among
    `PATTERNS`, or None. merges: the best first. bos, eos: names of special tokens; prompts begin with the first one
    where `adds_bos` says so. template: of a chat.
    """

    texts: dict[int, str]
    special: frozenset[int]
    pattern: str | None
    merges: list[str]
    bos: str | None
    adds_bos: bool
    eos: str | None
    template: str | None


def tokenizer_parts(checkpoint: Checkpoint) -> TokenizerParts:
    """Raises `CheckpointError` where a special token's name is also the visible form of an ordinary one."""
    tokenizer, chat = checkpoint.tokenizer, checkpoint.chat
    visible = bytes_to_unicode()
    texts = {id: "".join(map(visible.__getitem__, token)) for token, id in tokenizer.ranks.items()}
    ordinary = set(texts.values())
    if both := next((name for name in tokenizer.special_tokens if name in ordinary), None):
        raise CheckpointError(
            f"{printable(checkpoint.name)} has the token '{printable(both)}' twice, as text and as a special token, "
            "expected a vocabulary in which it is one of them; only --to meta could hold it."
        )
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    bos = None if tokenizer.bos_id is None else names[tokenizer.bos_id]
    eos = names[min(tokenizer.stop_ids)] if tokenizer.stop_ids else None
    if isinstance(chat, Llama3Format):
        eos = "<|eot_id|>"
    elif isinstance(chat, TemplateFormat):
        bos, eos = bos or chat.bos or None, chat.eos or eos
    return TokenizerParts(
        texts=dict(sorted((texts | names).items())),
        special=frozenset(names),
        pattern=next((name for name, pattern in PATTERNS.items() if pattern == tokenizer.pattern), None),
        merges=[f"{left} {right}" for left, right in merges_of(tokenizer.ranks)],
        bos=bos,
        adds_bos=tokenizer.bos_id is not None,
        eos=eos,
        template=template_of(chat),
    )


def template_of(chat: ChatFormat | None) -> str | None:
    """A chat format in the language of templates; None for a base model."""
    if isinstance(chat, TemplateFormat):
        return chat.source
    return None if chat is None else LLAMA3_TEMPLATE
