"""What the other forms' files say of a tokenizer: tokens as visible characters, merges, names, the chat template."""

from __future__ import annotations

from dataclasses import dataclass

from llama_scratch.chat_format import ChatFormat, Llama3Format, TemplateFormat
from llama_scratch.checkpoint.base import Checkpoint
from llama_scratch.checkpoint.byte_level_bpe import PATTERNS, bytes_to_unicode, merges_of
from llama_scratch.errors import CheckpointError, sanitize

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

    Args:
        texts: Id → text, for ordinary tokens in GPT-2's alphabet. Without names that fill up the embedding.
        special: Ids of special tokens.
        added: Ids of added tokens that are not special.
        pattern: Its name among `PATTERNS`, or None.
        merges: The best first.
        roles: As in `Extras`, with bos and eos if there are any.
        adds_bos: Whether a prompt begins with bos.
        template: The chat template.
    """

    texts: dict[int, str]
    special: frozenset[int]
    added: frozenset[int]
    pattern: str | None
    merges: list[str]
    roles: dict[str, int]
    adds_bos: bool
    template: str | None

    def text_of(self, role: str) -> str | None:
        """The text of the token that has a role."""
        return self.texts.get(self.roles.get(role, -1))


def tokenizer_parts(checkpoint: Checkpoint) -> TokenizerParts:
    """Describe a checkpoint's tokenizer.

    Raises:
        CheckpointError: If the name of an added token is also the visible form of another token.
    """
    tokenizer, chat = checkpoint.tokenizer, checkpoint.chat
    visible = bytes_to_unicode()
    texts = {id: "".join(map(visible.__getitem__, token)) for token, id in tokenizer.ranks.items()}
    ids = {text: id for id, text in texts.items()}
    names = {id: name for name, id in tokenizer.names.items() if name != f"[PAD{id}]" or id in tokenizer.stop_ids}
    if both := next((name for id, name in names.items() if ids.get(name, id) != id), None):
        raise CheckpointError(
            f"{sanitize(checkpoint.name)} has the token '{sanitize(both)}' twice, as text and as a special token, "
            "expected a vocabulary in which it is one of them; only `to=meta` could hold it."
        )
    roles = {role: id for role, id in checkpoint.extras.roles.items() if id in texts or id in names}
    roles |= {"unknown": tokenizer.names[tokenizer.unknown]} if tokenizer.unknown else {}
    roles |= {"bos": tokenizer.bos_id} if tokenizer.bos_id is not None else {}
    if isinstance(chat, Llama3Format):
        roles["eos"] = tokenizer.names["<|eot_id|>"]
    elif isinstance(chat, TemplateFormat):
        roles |= {role: tokenizer.names[t] for role, t in (("eos", chat.eos),) if t in tokenizer.names}
        roles = {role: tokenizer.names[t] for role, t in (("bos", chat.bos),) if t in tokenizer.names} | roles
    if "eos" not in roles and tokenizer.stop_ids:
        roles["eos"] = min(tokenizer.stop_ids)
    added = frozenset(tokenizer.added_tokens.values())
    return TokenizerParts(
        texts=dict(sorted((texts | names).items())),
        special=frozenset(tokenizer.special_tokens.values()),
        added=added,
        pattern=next((name for name, pattern in PATTERNS.items() if pattern == tokenizer.pattern), None),
        merges=[f"{left} {right}" for left, right in tokenizer.merges or merges_of(tokenizer.ranks)],
        roles=roles,
        adds_bos=tokenizer.bos_id is not None,
        template=template_of(chat),
    )


def template_of(chat: ChatFormat | None) -> str | None:
    """A chat format in the language of templates; None for a base model."""
    if isinstance(chat, TemplateFormat):
        return chat.source
    return None if chat is None else LLAMA3_TEMPLATE
