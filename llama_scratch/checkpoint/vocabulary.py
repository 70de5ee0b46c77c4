"""Byte-level BPE as GGUF and Hugging Face files write it ↔ tiktoken's table of ranks.

Those files hold each token's bytes as visible characters and a list of merges, the best first; tiktoken holds one
number a token, its rank, and merges the pair that makes the token of the lowest rank. Both cut a text alike where
the merges stand in the order of what they make, which is checked; and where the same pattern cuts it into pieces
first, which is known by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llama_scratch.errors import FETCH_AGAIN, CheckpointError, printable
from llama_scratch.tokenizer import LLAMA3_PATTERN

# GPT-2's own, and the same behind a step that makes each digit a piece of its own, in one expression.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
# By the names that llama.cpp gave them.
PATTERNS = {"llama-bpe": LLAMA3_PATTERN, "smollm": SMOLLM_PATTERN, "gpt-2": GPT2_PATTERN}
# Special tokens that end a text in the models that have them, beside those that a file names.
STOPS = {"<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's way to write any byte as one visible character: byte → character.

    Printable Latin-1 stands for itself; the others take the characters from U+0100 on, in order.
    Source: `bytes_to_unicode` in openai/gpt-2, src/encoder.py.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def ranks_of(texts: Iterable[tuple[int, str]]) -> dict[bytes, int]:
    """Ordinary tokens as visible characters, each with its id → bytes → rank. Raises `CheckpointError`."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    ranks: dict[bytes, int] = {}
    for id, text in texts:
        try:
            token = bytes(map(byte_of.__getitem__, text))
        except KeyError:
            raise CheckpointError(
                f"the token {id}, '{printable(text)}', is not in GPT-2's byte alphabet; {FETCH_AGAIN}"
            ) from None
        if not token or token in ranks:
            raise CheckpointError(f"the token {id} of the vocabulary is empty or stands there twice; {FETCH_AGAIN}")
        ranks[token] = id
    return ranks


def check_merges(merges: Iterable[tuple[str, str]], ranks: Mapping[bytes, int]) -> None:
    """tiktoken merges by the rank of the result: right only where the merges stand in the order of the ranks.

    A token may have one merge or several. Raises `CheckpointError` where it has none, or one out of order.
    """
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    previous, made = -1, 0
    for left, right in merges:
        parts = [bytes(byte_of.get(char, 0) for char in part) for part in (left, right)]
        rank = ranks.get(parts[0] + parts[1], -1)
        if rank < previous or not all(part in ranks for part in parts):
            merge = printable(f"{left} {right}".strip())
            raise CheckpointError(f"the merge '{merge}' is out of the order of the token ids; use another file.")
        made += rank > previous
        previous = rank
    merged = sum(len(token) > 1 for token in ranks)
    if made != merged:
        raise CheckpointError(f"the merges make {made} tokens of {merged}, expected all of them; {FETCH_AGAIN}")


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """The merges that make a table of ranks: of each token all pairs of tokens that are it, in its order.

    Source: `TikTokenConverter` in transformers, which made the list of Llama 3.
    """
    char_of = bytes_to_unicode()
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return [("".join(map(char_of.__getitem__, a)), "".join(map(char_of.__getitem__, b))) for a, b in merges]
