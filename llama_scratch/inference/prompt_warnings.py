"""Warnings about prompts that are likely to give a misleading answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llama_scratch.inference.prompt_text import Prompt
from llama_scratch.results import ENDS_IN_A_WORD, ENDS_IN_SPACE, PromptWarning, Token
from llama_scratch.tokenizer import Tokenizer


def prompt_warnings(
    tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int], next: Token, max_seq_len: int, *, special: bool
) -> Iterator[PromptWarning]:
    """Yield warnings about a prompt's tokenization and length.

    Args:
        tokenizer: The tokenizer that encoded the prompt.
        prompt: A text, or token ids.
        ids: The ids that the model received.
        next: The predicted token.
        max_seq_len: Maximum context that the model was trained for, in tokens.
        special: Whether special tokens in the text were parsed.
    """
    if isinstance(prompt, str):
        yield from tokenizer.warnings(prompt, special=special)
        if prompt.endswith(" "):
            yield PromptWarning(
                ENDS_IN_SPACE,
                "The prompt ends in a space, which is a token of its own. Words include their leading space, so "
                "end the prompt with the last word.",
            )
        elif _cut_differently(tokenizer, prompt, ids, next, special):
            yield PromptWarning(
                ENDS_IN_A_WORD,
                f"The prompt ends inside a token: with {next.text!r} added, it is tokenized differently. "
                "The model rarely saw such a split in training, so the prediction can be unreliable.",
            )
    bos = tokenizer.bos_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        yield PromptWarning(
            "doubled BOS",
            f"The text begins with {tokenizer.token_text(bos)} twice. "
            "It is added to every prompt automatically, so remove it from the text.",
        )
    if len(ids) > max_seq_len:
        yield PromptWarning(
            "beyond the context",
            f"The text has {len(ids):,} tokens, but the model was trained for up to {max_seq_len:,}. "
            "Predictions beyond that length are unreliable.",
        )


def _cut_differently(tokenizer: Tokenizer, prompt: str, ids: Sequence[int], next: Token, special: bool) -> bool:
    """Whether appending the predicted text changes the tokens of the prompt."""
    if next.id in tokenizer.untypeable:
        return False
    try:
        text = tokenizer.token_bytes(next.id).decode()
    except UnicodeDecodeError:  # part of a character
        return False
    return tokenizer.encode(prompt + text, bos=True, special=special)[: len(ids)] != list(ids)
