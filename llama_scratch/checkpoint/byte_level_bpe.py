"""Conversion between merge lists (GGUF, Hugging Face) and tiktoken's ranks.

The files write each token's bytes as visible characters and list the merges in order of priority. tiktoken has one
number per token, its rank, and merges the adjacent pair whose result has the lowest rank. Both give the same ids if:

- the merges are in the order of the tokens that they produce (`check_merges`),
- the merges can produce every token from its bytes (`unmergeable`),
- and the same pre-tokenizer pattern, identified by its name, splits the text first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise

from llama_scratch.chat_format import ChatFormat, Llama3Format, TemplateFormat
from llama_scratch.checkpoint.base import Checkpoint
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, sanitize
from llama_scratch.tokenizer import LLAMA3_PATTERN, Tokenizer

# GPT-2's pattern, and SmolLM2's: GPT-2's after a step that splits off each digit, combined into one expression.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
# llama.cpp's name of a pre-tokenizer → its pattern.
PATTERNS = {"llama-bpe": LLAMA3_PATTERN, "smollm": SMOLLM_PATTERN, "gpt-2": GPT2_PATTERN}
# llama.cpp's aliases of these three. Not jina-v1-en, jina-v2-code and roberta-bpe: they add a separator to each text.
# Source: `llama_vocab::impl::load` in ggml-org/llama.cpp, src/llama-vocab.cpp.
PRE_TOKENIZERS = {
    **{name: name for name in PATTERNS},
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), "llama-bpe"),
    **dict.fromkeys(("lfm2", "jina-v5-nano", "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), "llama-bpe"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), "smollm"),
    **dict.fromkeys(("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0"), "gpt-2"),
    **dict.fromkeys(("mellum", "modern-bert", "exaone4", "mpt", "olmo", "jais", "trillion"), "gpt-2"),
    "granite-docling": "gpt-2",
}
# Pre-tokenizers that add BOS unless the file says otherwise. Only with these, a piece that equals a token becomes that
# token even if no merges produce it.
BEGIN_WITH_BOS = {
    *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
}
# Twice the size of the largest vocabularies.
MAX_TOKENS, MAX_LENGTH = 1 << 19, 1 << 22
# Limit of the work of `_merged` for one vocabulary.
_MAX_STEPS = 1 << 22
_NEVER = 1 << 62
# SHA-256 of merge lists for which `unmergeable` returns nothing: Llama 3 (with whole=True) and SmolLM2. Skipping the
# check saves at least 0.1 s when these common models are loaded.
_MADE_BY_THEIR_MERGES = {
    "0cd100e0ab7dbd83c3b668a7cfb2aed1f63f2aec66dae6ec4b63de2c552bb82d": True,
    "aea6ed50becdb3beed814d2fde2dea2e655d1039addf269d74a4708ce2ed4d63": False,
}
# These tokens are stop tokens in every model that has them, in addition to those that its files name.
STOPS = {"<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}
# Names that llama.cpp treats as control tokens, whatever type the file gives them.
CONTROL = STOPS | {
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "</s>",
    "<EOT>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
}
_CONTROL_LOOKING = re.compile(r"<.*\w.*>|\[.*\w.*\]", re.DOTALL)
_LLAMA3_BEGIN = "<|begin_of_text|>"


def bytes_to_unicode() -> dict[int, str]:
    """Return GPT-2's mapping from bytes to visible characters.

    Printable Latin-1 maps to itself; the other bytes map to the characters from U+0100 on, in order.
    Source: `bytes_to_unicode` in openai/gpt-2, src/encoder.py.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_VISIBLE = frozenset(bytes_to_unicode().values())
# Visible characters → bytes as Latin-1. Invisible Latin-1 characters map outside of Latin-1, so that encoding fails.
_TO_LATIN_1 = dict.fromkeys(range(256), 0x3000) | {ord(char): byte for byte, char in bytes_to_unicode().items()}


def check_counts(tokens: Collection[str], merges: Sized) -> None:
    """Reject lists of tokens and merges that are too long, before any entry is read.

    Args:
        tokens: All tokens.
        merges: All merges. A token of n bytes can be split into two others in n - 1 ways.

    Raises:
        CheckpointError: If one of the lists is too long.
    """
    if len(tokens) > MAX_TOKENS:
        raise CheckpointError(f"it has {len(tokens):,} tokens, expected at most {MAX_TOKENS:,}. Use another file.")
    if (length := sum(map(len, tokens))) > MAX_LENGTH:
        raise CheckpointError(f"its tokens have {length:,} bytes, expected at most {MAX_LENGTH:,}. Use another file.")
    if len(merges) > length:
        raise CheckpointError(
            f"it has {len(merges):,} merges, so some are repeated or do not produce a token. {REDOWNLOAD_HINT}"
        )


def ranks_of(texts: Iterable[tuple[int, str]]) -> dict[bytes, int]:
    """Convert (id, visible characters) of ordinary tokens to bytes → rank.

    Raises:
        CheckpointError: If a token is empty, repeated, or not in GPT-2's byte alphabet.
    """
    ranks: dict[bytes, int] = {}
    for id, text in texts:
        try:
            token = text.translate(_TO_LATIN_1).encode("latin-1")
        except UnicodeEncodeError:
            raise CheckpointError(
                f"the token {id}, '{sanitize(text)}', is not in GPT-2's byte alphabet. {REDOWNLOAD_HINT}"
            ) from None
        if not token or token in ranks:
            raise CheckpointError(f"the token {id} of the vocabulary is empty or repeated. {REDOWNLOAD_HINT}")
        ranks[token] = id
    return ranks


def check_merges(merges: Iterable[tuple[str, str]], vocab: Mapping[str, int]) -> None:
    """Check that merges are in rank order, so that tiktoken's merging is equivalent.

    Args:
        merges: Pairs of tokens as visible characters, highest priority first.
        vocab: Ordinary tokens as visible characters → rank. Several merges may produce the same token.

    Raises:
        CheckpointError: If a token has no merge, or a merge is repeated or out of order.
    """
    merged = len(vocab) - sum(char in vocab for char in _VISIBLE)
    previous, n_made = -1, 0
    seen: set[str] = set()  # left halves of the merges that produce the current token
    for left, right in merges:
        rank = vocab.get(left + right, -1)
        if rank != previous:
            seen.clear()
            n_made += 1
        if rank < max(previous, 0) or left in seen or left not in vocab or right not in vocab:
            merge = sanitize(f"{left} {right}".strip())
            raise CheckpointError(
                f"the merge '{merge}' is not in the order of the token ids, which is not supported. Use another file."
            )
        seen.add(left)
        previous = rank
    if n_made != merged:
        raise CheckpointError(f"the merges produce only {n_made} of {merged} tokens. {REDOWNLOAD_HINT}")


def unmergeable(merges: Sequence[tuple[str, str]], vocab: Mapping[str, int], *, whole: bool) -> set[str]:
    """Find the tokens that a list of merges cannot produce from their own bytes.

    tiktoken merges any two neighbors whose concatenation is a token. A merge list allows only the pairs in it. Both
    give the same ids for every text if the list can produce each token from the token's own bytes: whether two
    neighbors can merge depends only on the bytes that they cover, and the list merges those bytes into the token.

    Args:
        merges: As for `check_merges`, which must have passed.
        vocab: As for `check_merges`.
        whole: Whether a piece that equals a token becomes that token without merging. Then tokens that are not the
            concatenation of two others do not matter. In Llama 3 these are the only unmergeable tokens.

    Raises:
        CheckpointError: If the check would take too long.
    """
    digest = hashlib.sha256("\n".join(map(" ".join, merges)).encode(errors="surrogatepass")).hexdigest()
    if _MADE_BY_THEIR_MERGES.get(digest) in (False, whole) or (whole and len(merges) == _count_splits(vocab)):
        return set()
    ranks = {pair: vocab[pair[0] + pair[1]] for pair in merges}
    order = dict.fromkeys(_VISIBLE, -1)  # tokens known to be mergeable → rank of the merge
    sources: dict[str, tuple[str, str]] = {}
    for pair, rank in ranks.items():
        if (token := pair[0] + pair[1]) not in sources and _comes_to(pair, rank, ranks, order, sources):
            sources[token], order[token] = pair, rank
    left = [token for token in vocab if token not in order]
    if sum(len(token) ** 2 for token in left) > _MAX_STEPS:
        raise CheckpointError("its merges produce too few of its tokens. Use another file.")
    return {token for token in left if _merged(token, ranks) != [token]}


def _count_splits(vocab: Mapping[str, int]) -> int:
    """Count the ways to split tokens of a vocabulary into two others."""
    count = 0
    for token in vocab:
        for i in range(1, len(token)):
            if token[:i] in vocab and token[i:] in vocab:
                count += 1
    return count


def _comes_to(
    pair: tuple[str, str],
    rank: int,
    ranks: Mapping[tuple[str, str], int],
    order: Mapping[str, int],
    sources: Mapping[str, tuple[str, str]],
) -> bool:
    """Whether two tokens can become neighbors before any merge crosses their boundary.

    Undoes the merges of both tokens, starting with the latest.
    Source: `is_valid_token_pair` in github/rust-gems, crates/bpe.
    """
    left, right = pair
    if left not in order or right not in order:
        return False
    while True:
        if order[left] > order[right]:
            rank, left = order[left], sources[left][1]
            if ranks.get((left, right), rank) < rank:
                return False
        elif order[right] >= 0:
            rank, right = order[right], sources[right][0]
            if ranks.get((left, right), rank + 1) <= rank:  # if the ranks are equal, the left merge comes first
                return False
        else:
            return True


def _merged(token: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge the bytes of a token, lowest rank first."""
    parts = list(token)
    while len(parts) > 1:
        pair_ranks = [ranks.get(pair, _NEVER) for pair in pairwise(parts)]
        if (best := min(pair_ranks)) == _NEVER:
            break
        i = pair_ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def is_reachable(text: str, merged: Collection[str]) -> bool:
    """Whether plain text can produce a token: a single byte or the result of a merge.

    Args:
        text: The token as visible characters.
        merged: The tokens that merges produce.
    """
    return text in merged or text in _VISIBLE


def is_hidden_control(text: str, merged: Collection[str]) -> bool:
    """Whether an ordinary token is in fact a control token.

    That is so if its text looks like one (`<|eot_id|>`, `</s>`, `[INST]`) and plain text cannot produce it.

    Args:
        text: The token as visible characters.
        merged: The tokens that merges produce.
    """
    return _CONTROL_LOOKING.fullmatch(text) is not None and not is_reachable(text, merged)


def guess_pre_tokenizer(names: Collection[str], make: Callable[[str], Tokenizer]) -> str | None:
    """Guess the pre-tokenizer of a vocabulary from its tokens.

    Llama 3 is recognized by its special tokens. Otherwise the guess is the pattern with the shortest pieces that does
    not split any token, because no token crosses a boundary of the pattern that the vocabulary was trained with.

    Args:
        names: Names of special tokens.
        make: Returns the tokenizer with a given pattern.

    Returns:
        A name in `PATTERNS`, or None if no pattern fits.
    """
    if _LLAMA3_BEGIN in names:
        return "llama-bpe"
    for name in ("smollm", "gpt-2", "llama-bpe"):
        tokenizer = make(PATTERNS[name])
        if all(
            tokenizer.encode(text) == [id]
            for token, id in tokenizer.ranks.items()
            if "\ufffd" not in (text := token.decode(errors="replace"))
        ):
            return name
    return None


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Derive merges from ranks: all splits of a token into two tokens, in rank order.

    Source: `TikTokenConverter` in transformers, which created Llama 3's list.
    """
    char_of = bytes_to_unicode()
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return [("".join(map(char_of.__getitem__, a)), "".join(map(char_of.__getitem__, b))) for a, b in merges]


# --- For the writers --------------------------------------------------------------------------

# `Llama3Format` as a Jinja template.
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
    """A tokenizer as Hugging Face and GGUF files describe it.

    Args:
        texts: Id → text; ordinary tokens are in GPT-2's byte alphabet. Unused rows of the embedding are left out.
        special: Ids of special tokens.
        added: Ids of added tokens that are not special.
        pattern: Name of the pattern in `PATTERNS`, or None.
        merges: Merges, highest priority first.
        roles: As in `Extras`, with bos and eos if they exist.
        adds_bos: Whether bos is prepended to a prompt.
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
        """Return the text of the token with a role."""
        return self.texts.get(self.roles.get(role, -1))


def tokenizer_parts(checkpoint: Checkpoint) -> TokenizerParts:
    """Describe a checkpoint's tokenizer.

    Raises:
        CheckpointError: If the text of an added token is also the text of another token in GPT-2's byte alphabet.
    """
    tokenizer, chat = checkpoint.tokenizer, checkpoint.chat
    visible = bytes_to_unicode()
    texts = {id: "".join(map(visible.__getitem__, token)) for token, id in tokenizer.ranks.items()}
    ids = {text: id for id, text in texts.items()}
    names = {id: name for name, id in tokenizer.names.items() if name != f"[PAD{id}]" or id in tokenizer.stop_ids}
    if both := next((name for id, name in names.items() if ids.get(name, id) != id), None):
        raise CheckpointError(
            f"{sanitize(checkpoint.name)} has the token '{sanitize(both)}' twice, as text and as a special token, "
            "which this format cannot hold. Try `to=meta`."
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
    """Return a chat format as a Jinja template; None for a base model."""
    if isinstance(chat, TemplateFormat):
        return chat.source
    return None if chat is None else LLAMA3_TEMPLATE
