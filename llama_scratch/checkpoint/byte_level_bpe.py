"""Byte-level BPE as GGUF and Hugging Face files write it ↔ tiktoken's table of ranks.

Those files hold each token's bytes as visible characters and a list of merges, the best first. tiktoken holds one
number per token, its rank, and joins the two tokens that are the token of the lowest rank. Both give the same ids if
the merges are in the order of the tokens that they make (`check_merges`), if the list makes every token of its own
bytes (`unmergeable`), and if the same pattern cuts the text into pieces first, which is known by its name.
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

# GPT-2's own, and the same behind a step that makes each digit a piece of its own, in one expression.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
# By the names that llama.cpp gave them.
PATTERNS = {"llama-bpe": LLAMA3_PATTERN, "smollm": SMOLLM_PATTERN, "gpt-2": GPT2_PATTERN}
# llama.cpp's other names for these three. Without jina-v1-en, jina-v2-code and roberta-bpe, which put a separator
# after each text. Source: `llama_vocab::impl::load` in ggml-org/llama.cpp, src/llama-vocab.cpp.
PRE_TOKENIZERS = {
    **{name: name for name in PATTERNS},
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), "llama-bpe"),
    **dict.fromkeys(("lfm2", "jina-v5-nano", "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), "llama-bpe"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), "smollm"),
    **dict.fromkeys(("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0"), "gpt-2"),
    **dict.fromkeys(("mellum", "modern-bert", "exaone4", "mpt", "olmo", "jais", "trillion"), "gpt-2"),
    "granite-docling": "gpt-2",
}
# Those with which a prompt begins with BOS unless the file says otherwise. With them alone, a piece that is a token
# becomes that token whether or not merges make it.
BEGIN_WITH_BOS = {
    *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
}
# Twice as many as the largest vocabularies have.
MAX_TOKENS, MAX_LENGTH = 1 << 19, 1 << 22
# Steps that `_merged` may take for one vocabulary.
_MAX_STEPS = 1 << 22
_NEVER = 1 << 62
# SHA-256 of lists of merges that `unmergeable` found nothing in: of Llama 3 (as whole pieces) and SmolLM2. It saves
# their many users a tenth of a second or more.
_MADE_BY_THEIR_MERGES = {
    "0cd100e0ab7dbd83c3b668a7cfb2aed1f63f2aec66dae6ec4b63de2c552bb82d": True,
    "aea6ed50becdb3beed814d2fde2dea2e655d1039addf269d74a4708ce2ed4d63": False,
}
# Special tokens that end a text in the models that have them, beside those that a file names.
STOPS = {"<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}
# Names that llama.cpp takes for control tokens, whatever type the file gives them.
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
    """GPT-2's way to write any byte as one visible character: byte → character.

    Printable Latin-1 stands for itself; the others take the characters from U+0100 on, in order.
    Source: `bytes_to_unicode` in openai/gpt-2, src/encoder.py.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_VISIBLE = frozenset(bytes_to_unicode().values())
# Visible characters → bytes as Latin-1. The Latin-1 characters that are not visible become one that is not Latin-1.
_TO_LATIN_1 = dict.fromkeys(range(256), 0x3000) | {ord(char): byte for byte, char in bytes_to_unicode().items()}


def check_counts(tokens: Collection[str], merges: Sized) -> None:
    """Reject lists of tokens and merges of impossible lengths before looking at each.

    Args:
        tokens: All tokens.
        merges: All merges. A token of n bytes can be made of two others in n - 1 ways.

    Raises:
        CheckpointError: If one of the lists is too long.
    """
    if len(tokens) > MAX_TOKENS:
        raise CheckpointError(f"it has {len(tokens):,} tokens, expected at most {MAX_TOKENS:,}; use another file.")
    if (length := sum(map(len, tokens))) > MAX_LENGTH:
        raise CheckpointError(f"its tokens have {length:,} bytes, expected at most {MAX_LENGTH:,}; use another file.")
    if len(merges) > length:
        raise CheckpointError(
            f"it has {len(merges):,} merges, so that some are repeated or make no token; {REDOWNLOAD_HINT}"
        )


def ranks_of(texts: Iterable[tuple[int, str]]) -> dict[bytes, int]:
    """Ordinary tokens as visible characters, each with its id → bytes → rank. Raises `CheckpointError`."""
    ranks: dict[bytes, int] = {}
    for id, text in texts:
        try:
            token = text.translate(_TO_LATIN_1).encode("latin-1")
        except UnicodeEncodeError:
            raise CheckpointError(
                f"the token {id}, '{sanitize(text)}', is not in GPT-2's byte alphabet; {REDOWNLOAD_HINT}"
            ) from None
        if not token or token in ranks:
            raise CheckpointError(f"the token {id} of the vocabulary is empty or stands there twice; {REDOWNLOAD_HINT}")
        ranks[token] = id
    return ranks


def check_merges(merges: Iterable[tuple[str, str]], vocab: Mapping[str, int]) -> None:
    """Check that merging by rank, as tiktoken does, is merging in the order of a list of merges.

    Args:
        merges: Pairs of tokens as visible characters, the best first.
        vocab: Ordinary tokens as visible characters → rank. A token may have one merge or several.

    Raises:
        CheckpointError: If a token has no merge, or a merge is repeated or out of order.
    """
    merged = len(vocab) - sum(char in vocab for char in _VISIBLE)
    previous, n_made = -1, 0
    seen: set[str] = set()  # left parts of the merges that make one token
    for left, right in merges:
        rank = vocab.get(left + right, -1)
        if rank != previous:
            seen.clear()
            n_made += 1
        if rank < max(previous, 0) or left in seen or left not in vocab or right not in vocab:
            merge = sanitize(f"{left} {right}".strip())
            raise CheckpointError(f"the merge '{merge}' is out of the order of the token ids; use another file.")
        seen.add(left)
        previous = rank
    if n_made != merged:
        raise CheckpointError(f"the merges make {n_made} tokens of {merged}, expected all of them; {REDOWNLOAD_HINT}")


def unmergeable(merges: Sequence[tuple[str, str]], vocab: Mapping[str, int], *, whole: bool) -> set[str]:
    """Find the tokens that the merges of a list do not make of their own bytes.

    tiktoken makes a token of any two that are it, a list of merges only of those that it names. If the merges make
    each token of its own bytes, both are the same for every text: what two neighbors can become depends only on the
    bytes that they cover, and those end in the token by a merge of the list.

    Args:
        merges: As for `check_merges`, which has passed.
        vocab: As for `check_merges`.
        whole: Whether a piece that is a token becomes that token at once, so that the tokens which no pair of
            others can make do not matter. Those of Llama 3 are the only ones that its list does not make.

    Raises:
        CheckpointError: If the vocabulary is built so that finding out takes too long.
    """
    digest = hashlib.sha256("\n".join(map(" ".join, merges)).encode(errors="surrogatepass")).hexdigest()
    if _MADE_BY_THEIR_MERGES.get(digest) in (False, whole) or (whole and len(merges) == _count_splits(vocab)):
        return set()
    ranks = {pair: vocab[pair[0] + pair[1]] for pair in merges}
    order = dict.fromkeys(_VISIBLE, -1)  # of the tokens that are made for certain, and the merge that makes each
    sources: dict[str, tuple[str, str]] = {}
    for pair, rank in ranks.items():
        if (token := pair[0] + pair[1]) not in sources and _comes_to(pair, rank, ranks, order, sources):
            sources[token], order[token] = pair, rank
    left = [token for token in vocab if token not in order]
    if sum(len(token) ** 2 for token in left) > _MAX_STEPS:
        raise CheckpointError("its merges make too few of its tokens; use another file.")
    return {token for token in left if _merged(token, ranks) != [token]}


def _count_splits(vocab: Mapping[str, int]) -> int:
    """How many pairs of tokens are a third one."""
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
    """Whether two tokens come to be neighbors before anything joins them: their merges undone, the latest first.

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
            if ranks.get((left, right), rank + 1) <= rank:  # of two equal merges the first one comes first
                return False
        else:
            return True


def _merged(token: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge the bytes of a token, the pair of the lowest rank first."""
    parts = list(token)
    while len(parts) > 1:
        pair_ranks = [ranks.get(pair, _NEVER) for pair in pairwise(parts)]
        if (best := min(pair_ranks)) == _NEVER:
            break
        i = pair_ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def is_reachable(text: str, merged: Collection[str]) -> bool:
    """Whether plain text can become a token: a single byte, or one of the tokens that merges make."""
    return text in merged or text in _VISIBLE


def is_hidden_control(text: str, merged: Collection[str]) -> bool:
    """Whether a token listed as an ordinary one is a control token by its spelling: `<|eot_id|>`, `</s>`, `[INST]`.

    Plain text cannot become it, so no model saw it as text.
    """
    return _CONTROL_LOOKING.fullmatch(text) is not None and not is_reachable(text, merged)


def guess_pre_tokenizer(names: Collection[str], make: Callable[[str], Tokenizer]) -> str | None:
    """Find the pre-tokenizer of a vocabulary whose file does not name it.

    Llama 3 is known by its special tokens. Otherwise it is the narrowest pattern that leaves every token in one
    piece, because a vocabulary that was trained behind a pattern has no token across its cuts.

    Args:
        names: The names of special tokens.
        make: Makes the tokenizer with a pattern.

    Returns:
        One of the names of `PATTERNS`, or None if no pattern is possible.
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


# --- What the writers need --------------------------------------------------------------------

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
