"""Text ↔ token ids: tiktoken's byte-pair encoding, with Llama's special tokens."""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import tiktoken

from llama_scratch.errors import (
    REDOWNLOAD_HINT,
    CheckpointError,
    LlamaScratchError,
    ModelNotFoundError,
    UsageError,
    sanitize,
)
from llama_scratch.results import PromptWarning
from llama_scratch.system.small_files import read_bytes, read_remote, without_mark

# Pre-tokenization: splits text into pieces before the merges. Source: `Tokenizer.pat_str` in llama-models.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
_LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_N_LLAMA3_SPECIAL = 256
_MAX_BYTES = 1 << 24  # size of a tokenizer.model; Llama 4's has 3.6 MB

# Texts are cut at these lengths, as in Meta's `Tokenizer.encode`.
_MAX_CHARS = 400_000  # longer texts overflow tiktoken's regex engine
_MAX_RUN = 25_000  # longer runs of whitespace, or of non-whitespace, take quadratic time
_RUN = re.compile(r"\s+|\S+")
_MAX_NAMES = 1 << 18  # total characters of named tokens; compiling their pattern takes 3 µs per character
_MAX_RANKS = 1 << 18  # lines of a tokenizer.model; Llama 4's has 200,000


class Tokenizer:
    """A tiktoken encoding plus named tokens.

    Named tokens are matched before the text is split into pieces: added tokens always, special tokens only if the
    caller allows it, unused tokens never.

    Args:
        ranks: Bytes of each ordinary token → its id, which is also its merge priority.
        special_tokens: Name of each special token → its id.
        pattern: The regular expression that splits text into pieces. Merges never cross pieces.
        added_tokens: Name of each added token that is not special, such as `<think>` → its id. `ranks` can have it too.
        unused_tokens: Names for ids that never occur in text, such as the padding rows of an embedding.
        bos: The token that a prompt starts with, if the model was trained with one.
        stops: Tokens that end a text.
        unknown: The token that replaces bytes without a token. Required if there are such bytes.
        merges: The pairs of tokens to merge, in order, with bytes as printable characters. By default, two tokens are
            merged if their concatenation is a token, which is equivalent for a trained vocabulary.
        unmergeable: Tokens that merges cannot produce from their own bytes.
        whole_pieces: Whether a piece that equals an unmergeable token is encoded as that token.

    Raises:
        CheckpointError: If a name is empty, not valid Unicode or too long, or if a byte has no token.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        pattern: str,
        *,
        added_tokens: Mapping[str, int] | None = None,
        unused_tokens: Mapping[str, int] | None = None,
        bos: str | None = None,
        stops: Iterable[str] = (),
        unknown: str | None = None,
        merges: Sequence[tuple[str, str]] | None = None,
        unmergeable: Iterable[bytes] = (),
        whole_pieces: bool = True,
    ):
        self.ranks = dict(ranks)
        self.special_tokens = dict(special_tokens)
        self.added_tokens = dict(added_tokens or {})
        self._unused_tokens = dict(unused_tokens or {})
        self.pattern = pattern
        self.unknown = unknown
        self.merges = None if merges is None else list(merges)
        self.whole_pieces = whole_pieces
        hidden = {token: self.ranks[token] for token in unmergeable}
        self._pieces = hidden if whole_pieces else {}
        self.names = self._unused_tokens | self.added_tokens | self.special_tokens  # all named tokens → id
        self.bos_id = None if bos is None else self.names[bos]
        self.stop_ids = frozenset(self.names[stop] for stop in stops)
        _check_names(self.names)
        self._bytes = {id: text.encode() for text, id in self.names.items()}
        self._bytes |= {id: token for token, id in ranks.items()}
        self.n_vocab = max(self._bytes) + 1
        self.max_token_bytes = max(map(len, self._bytes.values()))
        # tiktoken panics on a byte without a token. So each such byte gets an id beyond the vocabulary, which is never
        # merged, and `encode` replaces these ids with the unknown token.
        self._missing = frozenset(_missing_bytes(ranks))
        if self._missing and unknown is None:
            raise CheckpointError(
                f"the vocabulary has no token for the byte {min(self._missing):#04x} and no unknown token."
            )
        self._encoding = tiktoken.Encoding(
            name="llama-scratch",
            pat_str=pattern,
            mergeable_ranks={
                **{token: id for token, id in ranks.items() if token not in hidden},
                **{bytes([byte]): self.n_vocab + byte for byte in self._missing},
            },
            special_tokens={},  # `encode` matches them: tiktoken does not prefer the longest match
        )

    @classmethod
    def from_meta(cls, path: str) -> Tokenizer:
        """Read Meta's `tokenizer.model` from a local path, gs:// or az://.

        Raises `ModelNotFoundError` if the file does not exist and `CheckpointError` if it is damaged.
        """
        return parse_tokenizer_model(_read(path), path)

    @cached_property
    def _fingerprint(self) -> str:
        ranks, special, added = (
            sorted(tokens.items(), key=lambda entry: entry[1])
            for tokens in (self.ranks, self.special_tokens, self.added_tokens)
        )
        merges = [] if self.merges is None else [self.merges, self.whole_pieces]
        rules = (ranks, special, self.pattern, self.bos_id, *([added] if added else []), *merges)
        return hashlib.sha256(repr(rules).encode()).hexdigest()

    def encode(self, text: str, *, bos: bool = False, special: bool = False, limit: int | None = None) -> list[int]:
        """Convert text to token ids, in linear time.

        Lone surrogates become U+FFFD, and bytes without a token become the unknown token; see `warnings`.

        Args:
            text: Any text. Names of added tokens that are not special are always parsed.
            bos: Start with the BOS token, if the model has one.
            special: Parse names of special tokens, such as `<|eot_id|>`. Otherwise, they are plain text.
            limit: Stop early once there are more ids than this.

        Returns:
            All ids, or at least the first `limit` + 1 of them.

        >>> tokenizer.encode("Hello", bos=True)  # doctest: +SKIP
        [128000, 9906]
        """
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for part in self._parts(replace_surrogates(text), special):
            ids += part
            if limit is not None and len(ids) > limit:
                break
        if self.unknown is None:
            return ids
        unknown_id = self.names[self.unknown]
        return [id if id < self.n_vocab else unknown_id for id in ids]

    def _parts(self, text: str, special: bool) -> Iterator[list[int]]:
        """Yield the ids of a text, part by part."""
        cuts = _cuts(text)
        start = 0
        for name in self._named(text, special, cuts):
            yield from self._ordinary(text, start, name.start(), cuts)
            yield [self.names[name[0]]]
            start = name.end()
        yield from self._ordinary(text, start, len(text), cuts)

    def _named(self, text: str, special: bool, cuts: list[int]) -> Iterator[re.Match[str]]:
        """Find the named tokens in a text. As in Meta's tokenizer, a special token never spans a cut."""
        names, start = self._special_names if special else self._added_names, 0
        while names and (name := names.search(text, start)):
            start = name.end()
            if name[0] in self.special_tokens and bisect_right(cuts, name.start()) != bisect_left(cuts, start):
                start = name.start() + 1
                continue
            yield name

    def _ordinary(self, text: str, start: int, stop: int, cuts: list[int]) -> Iterator[list[int]]:
        """Yield the ids of a span without named tokens, cut by cut."""
        inside = cuts[bisect_right(cuts, start) : bisect_left(cuts, stop)]
        for begin, end in pairwise([start, *inside, stop]):
            if self._pieces:
                yield list(self._by_piece(text[begin:end]))
            else:
                yield self._encoding.encode_ordinary(text[begin:end])

    def _by_piece(self, text: str) -> Iterator[int]:
        """Yield the ids of a text. A piece that equals an unmergeable token becomes that token."""
        import regex  # type: ignore[import-untyped]  # supports tiktoken's patterns

        for piece in regex.findall(self.pattern, text):
            token = piece.encode()
            if (id := self._pieces.get(token)) is not None:
                yield id
            else:
                yield from self._encoding._encode_single_piece(token)

    @cached_property
    def _added_names(self) -> re.Pattern[str] | None:
        return any_of(self.added_tokens)

    @cached_property
    def _special_names(self) -> re.Pattern[str] | None:
        return any_of([*self.added_tokens, *self.special_tokens])

    @cached_property
    def untypeable(self) -> frozenset[int]:
        """Ids that plain text never produces: special and unused tokens."""
        return frozenset({*self.special_tokens.values(), *self._unused_tokens.values()} - set(self.ranks.values()))

    def warnings(self, text: str, *, special: bool = False) -> list[PromptWarning]:
        """Return warnings about text that `encode` may not read as the user expects.

        Args:
            text: The text that was encoded.
            special: Whether special tokens in it were parsed.
        """
        messages = {}
        clean = replace_surrogates(text)
        if clean.count("\ufffd") > text.count("\ufffd"):
            messages["not Unicode"] = "The prompt contains invalid Unicode; each such character was read as U+FFFD."
        if self._missing and not self._missing.isdisjoint(clean.encode()):
            messages["unknown bytes"] = f"The prompt contains bytes without a token; each was read as {self.unknown}."
        if not special and (name := next((name for name in self.special_tokens if name in clean), None)):
            message = f"The prompt contains {name}, which was read as plain text. Turn on `special` to change that."
            messages["special tokens as text"] = message
        return [PromptWarning(cause, message) for cause, message in messages.items()]

    def decode(self, ids: Iterable[int]) -> str:
        """Convert ids to text. Invalid UTF-8 becomes U+FFFD; special tokens become names."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token. Raises `UsageError` if the id does not exist."""
        try:
            return self._bytes[id]
        except KeyError:
            raise UsageError(f"{id} is not a token id of this model; ids go from 0 to {self.n_vocab - 1}.") from None

    def stream(self) -> StreamDecoder:
        """Create a decoder for ids that arrive one by one."""
        return StreamDecoder(self)

    def token_text(self, id: int) -> str:
        r"""Return the text of a token. Bytes that are not valid UTF-8 become `\xNN`."""
        return self.token_bytes(id).decode("utf-8", errors="backslashreplace")


def fingerprint_of(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of a tokenizer's tokens and rules, in hexadecimal."""
    return tokenizer._fingerprint


class StreamDecoder:
    """Decodes ids one by one, and returns each character once it is complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int, *, final: bool = False) -> str:
        """Return the characters that an id completes.

        Args:
            id: The next token.
            final: Whether it is the last one. An incomplete character then becomes U+FFFD.
        """
        return self._utf8.decode(self._tokenizer.token_bytes(id), final)


def replace_surrogates(text: str) -> str:
    """Replace surrogate pairs with their character, and lone surrogates with U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", errors="surrogatepass").decode("utf-16-le", errors="replace")


def any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """Compile a pattern that matches any of the names, preferring the longest."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _check_names(names: Mapping[str, int]) -> None:
    for name, id in names.items():
        if not name or replace_surrogates(name) != name:
            raise CheckpointError(f"the name of token {id}, '{sanitize(name)}', is not valid text. {REDOWNLOAD_HINT}")
    if (total := sum(map(len, names))) > _MAX_NAMES:
        raise CheckpointError(
            f"the names of its {len(names):,} special and added tokens have {total:,} characters, expected at most "
            f"{_MAX_NAMES:,}. Use another file."
        )


def _cuts(text: str) -> list[int]:
    """Return the positions at which Meta's tokenizer cuts a text, see `_MAX_CHARS` and `_MAX_RUN`."""
    if len(text) <= _MAX_RUN:
        return []
    cuts = []
    for start in range(0, len(text), _MAX_CHARS):
        cuts.append(start)
        for run in _RUN.finditer(text, start, start + _MAX_CHARS):
            cuts += range(run.start() + _MAX_RUN, run.end(), _MAX_RUN)
    return cuts


# --- Meta's tokenizer.model -------------------------------------------------------------------


def _read(path: str) -> bytes:
    name = sanitize(path, 200)
    try:
        data = read_remote(path, _MAX_BYTES) if "://" in path else read_bytes(path, _MAX_BYTES)
    except LlamaScratchError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFoundError(
            f"There is no tokenizer at {name}. Put it next to the weights, or pass its path as `tokenizer`."
        ) from error
    except IsADirectoryError as error:
        if (inside := Path(path) / "tokenizer.model").is_file():
            return _read(str(inside))
        raise ModelNotFoundError(f"{name} is a directory without tokenizer.model. Choose the file itself.") from error
    except Exception as error:  # blobfile and the cloud clients raise their own classes
        reason = getattr(error, "strerror", None) or sanitize(error, 200) or type(error).__name__
        raise LlamaScratchError(f"{name} cannot be read: {reason}. Check the path and its permissions.") from error
    if data.lstrip().startswith(b"{"):
        raise CheckpointError(
            f"{name} is JSON, such as Hugging Face's tokenizer.json, instead of Meta's tokenizer.model. "
            "Choose a tokenizer.model, or load the directory with Hugging Face's files as a model."
        )
    return without_mark(data, name)


def parse_tokenizer_model(data: bytes, path: str = "tokenizer.model") -> Tokenizer:
    """Create Llama 3's tokenizer from Meta's file.

    Args:
        data: The content of the file.
        path: Its name, for error messages.
    """
    if b"<unk>" in data[:64]:
        raise CheckpointError(
            f"{path} is a SentencePiece vocabulary, as in Llama 2, which is not supported. Choose Llama 3 or later."
        )
    ranks = _parse_ranks(data, path)
    names = list(_LLAMA3_SPECIAL)
    names += [f"<|reserved_special_token_{2 + i}|>" for i in range(_N_LLAMA3_SPECIAL - len(names))]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    return Tokenizer(ranks, special, LLAMA3_PATTERN, bos="<|begin_of_text|>", stops=_LLAMA3_STOPS)


def _parse_ranks(data: bytes, path: str) -> dict[bytes, int]:
    """Parse lines of `base64 rank` to token → rank. Ranks count up from 0, and all 256 bytes must be tokens."""
    ranks: dict[bytes, int] = {}
    lines = data.splitlines()
    if len(lines) > _MAX_RANKS:
        raise CheckpointError(f"{path} has {len(lines):,} lines, expected at most {_MAX_RANKS:,}. {REDOWNLOAD_HINT}")
    for number, line in enumerate(lines, start=1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if base64.b64encode(token) != encoded or token in ranks or rank != b"%d" % len(ranks):
                raise ValueError
        except (ValueError, binascii.Error):
            start = sanitize(line[:40].decode("utf-8", errors="backslashreplace"))
            raise CheckpointError(
                f"{path}, line {number}: found '{start}', expected a new token in base64 and the rank {len(ranks)}. "
                + REDOWNLOAD_HINT
            ) from None
        ranks[token] = len(ranks)
    if missing := _missing_bytes(ranks):
        raise CheckpointError(f"{path} has no token for byte {missing[0]:#04x}. {REDOWNLOAD_HINT}")
    return ranks


def _missing_bytes(ranks: Mapping[bytes, int]) -> list[int]:
    return [byte for byte in range(256) if bytes([byte]) not in ranks]
