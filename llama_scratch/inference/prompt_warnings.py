"""What a person should know of a prompt before he believes the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llama_scratch.inference.prompt_text import Prompt
from llama_scratch.results import ENDS_IN_A_WORD, ENDS_IN_SPACE, PromptWarning, Token
from llama_scratch.tokenizer import Tokenizer


def prompt_warnings(
    tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int], next: Token, max_seq_len: int, *, special: bool
) -> Iterator[PromptWarning]:
    """Warnings about how a prompt was tokenized and how long it is.

    Args:
        tokenizer: The tokenizer that made `ids` of the prompt.
        prompt: A text, or token ids.
        ids: What the model saw.
        next: The predicted token.
        max_seq_len: The longest context that the model was trained for, in tokens.
        special: Whether the names of special tokens in the text were read as these.
    """
    if isinstance(prompt, str):
        yield from tokenizer.warnings(prompt, special=special)
        if prompt.endswith(" "):
            yield PromptWarning(
                ENDS_IN_SPACE,
                "The prompt ends in a space, which became a token of its own; words bring their own space and "
                "only numbers come after a lone one, so end the prompt with the last word.",
            )
        elif _cut_differently(tokenizer, prompt, ids, next, special):
            yield PromptWarning(
                ENDS_IN_A_WORD,
                f"The prompt ends inside of what is one token once {next.text!r} follows it; "
                "the model rarely saw it cut like this, so the answer may surprise.",
            )
    bos = tokenizer.bos_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        yield PromptWarning(
            "doubled BOS",
            f"The text begins with {tokenizer.token_text(bos)} twice, expected once; "
            "it is put in front of each prompt, so leave it out.",
        )
    if len(ids) > max_seq_len:
        yield PromptWarning(
            "beyond the context",
            f"The text has {len(ids):,} tokens, and the model was trained for up to {max_seq_len:,}; "
            "what it says so far out is not to be relied on.",
        )


def _cut_differently(tokenizer: Tokenizer, prompt: str, ids: Sequence[int], next: Token, special: bool) -> bool:
    """Whether the prompt with the predicted text behind it would have become other tokens than `ids`."""
    if next.id in tokenizer.untypeable:
        return False
    try:
        text = tokenizer.token_bytes(next.id).decode()
    except UnicodeDecodeError:  # a part of a character
        return False
    return tokenizer.encode(prompt + text, bos=True, special=special)[: len(ids)] != list(ids)
