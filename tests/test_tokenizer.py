"""Text ↔ ids: equal to Meta's tokenizer and, for SmolLM2, to Hugging Face's; no input makes it fail."""

from __future__ import annotations

import base64
import importlib
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.errors import CheckpointError, ModelNotFoundError, UsageError
from llama_scratch.tokenizer import StreamDecoder, Tokenizer, parse_tokenizer_model, replace_surrogates
from tests.helpers.checkpoints import tokenizer_file
from tests.helpers.texts import FRAGMENTS, UNWRITTEN

pytestmark = pytest.mark.reference

Encode = Callable[[str], list[int]]

many = settings(max_examples=500, deadline=None, derandomize=True)

mixed = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=2), max_size=40).map("".join)
texts = st.text(max_size=100) | mixed
# Lone and paired surrogates among other characters, as a misconfigured terminal or JSON can produce them.
broken_texts = st.lists(
    st.sampled_from(["\ud83d", "\ude42", "\ud83d\ude42", "\udfff", "\ud800", "a", " ", "é", "🙂"]), max_size=12
).map("".join)


@pytest.fixture(scope="module")
def llama3(meta_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.from_meta(str(meta_tokenizer_path))


@pytest.fixture(scope="module")
def metas(meta_tokenizer_path: Path) -> Any:
    """Meta's own `Tokenizer` with the same file."""
    return importlib.import_module("llama_models.llama3.tokenizer").Tokenizer(meta_tokenizer_path)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return open_checkpoint(smollm2_path).tokenizer


@pytest.fixture(scope="module", params=["llama3", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each of the two vocabularies."""
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


# --- Equal to Meta's --------------------------------------------------------------------------


@many
@given(text=st.text())
def test_any_text_has_metas_ids(llama3: Tokenizer, metas: Any, text: str) -> None:
    """Any Unicode text."""
    assert llama3.encode(text) == metas.encode(text, bos=False, eos=False)


@many
@given(text=mixed)
def test_hard_text_has_metas_ids(llama3: Tokenizer, metas: Any, text: str) -> None:
    """As plain text, with special tokens, and with the beginning-of-text token."""
    plain = metas.encode(text, bos=False, eos=False)
    assert llama3.encode(text) == plain
    assert llama3.encode(text, bos=True) == metas.encode(text, bos=True, eos=False) == [128000, *plain]
    assert llama3.encode(text, special=True) == metas.encode(text, bos=False, eos=False, allowed_special="all")


def long_text(seed: int) -> str:
    """Half a million characters in runs that are at, just over and far over the limit of 25,000."""
    chance = random.Random(seed)
    text = ""
    while len(text) < 500_000:
        characters = chance.choice([" ", " \n", "\t\u3000", "ab", "1", "0123", "^", "=-", "é", "漢字", "a.b", "🙂"])
        length = chance.choice([3, 24_999, 25_000, 25_001, 49_999, 50_000, 50_001, 77_777])
        text += (characters * length)[:length]
    return text


@pytest.mark.parametrize(
    "text",
    [
        *map(long_text, range(6)),
        ("The year 1984 wasn't   like <|eot_id|> this.\r\n" * 20_000)[:850_001],
        " " * 399_999 + "ab" * 30_000 + "\n" * 400_000,
        "a" * 25_001 + " " * 25_001 + "1" * 400_000,
    ],
    ids=[*(f"runs {seed}" for seed in range(6)), "prose", "across 400,000", "three runs"],
)
def test_long_text_is_cut_where_meta_cuts_it(llama3: Tokenizer, metas: Any, text: str) -> None:
    """Texts over 400,000 characters, and runs of whitespace or non-whitespace over 25,000."""
    assert len(text) > 400_000
    assert llama3.encode(text) == metas.encode(text, bos=False, eos=False)
    assert llama3.encode(text, special=True) == metas.encode(text, bos=False, eos=False, allowed_special="all")


def test_known_words_have_their_known_ids(llama3: Tokenizer) -> None:
    """The examples in the README."""
    assert llama3.encode("Hello") == [9906]
    assert llama3.encode("My name is", bos=True) == [128000, 5159, 836, 374]
    assert llama3.decode([128000, 9906]) == "<|begin_of_text|>Hello"


def test_the_beginning_of_text_comes_once(llama3: Tokenizer) -> None:
    """Once at the beginning with `bos`, and never because a user typed its name."""
    for text in ("", "Hello", "<|begin_of_text|>", "<|begin_of_text|>Hello", "a <|begin_of_text|>", "x" * 500_000):
        assert llama3.encode(text, bos=True)[0] == 128000
        assert llama3.encode(text, bos=True).count(128000) == 1
        assert 128000 not in llama3.encode(text)


def test_special_tokens_have_their_places(llama3: Tokenizer, metas: Any) -> None:
    """The 256 ids after the ranks, including those of Llama 3.1 and later."""
    assert llama3.special_tokens == metas.special_tokens
    assert llama3.n_vocab == metas.n_words == 128_256
    assert llama3.bos_id == metas.bos_id == 128_000
    assert llama3.stop_ids == set(metas.stop_tokens) == {128_001, 128_008, 128_009}
    known = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_0|>": 128002,
        "<|reserved_special_token_1|>": 128003,
        "<|finetune_right_pad_id|>": 128004,
        "<|step_id|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|image|>": 128011,
        "<|reserved_special_token_2|>": 128012,
        "<|reserved_special_token_245|>": 128255,
    }
    assert known.items() <= llama3.special_tokens.items()


def test_a_special_token_that_is_typed_is_plain_text(llama3: Tokenizer) -> None:
    """Unless `special` is on. tiktoken itself raises an error."""
    typed = llama3.encode("a<|eot_id|>b")
    assert max(typed) < 128_000
    assert llama3.decode(typed) == "a<|eot_id|>b"
    assert llama3.encode("a<|eot_id|>b", special=True) == [*llama3.encode("a"), 128009, *llama3.encode("b")]


# --- Any text, at any length ------------------------------------------------------------------


@many
@given(text=st.text(max_size=60) | mixed)
def test_text_comes_back_as_it_was(llama3: Tokenizer, text: str) -> None:
    """As text and byte for byte, without a warning."""
    assert llama3.decode(llama3.encode(text)) == text
    assert b"".join(map(llama3.token_bytes, llama3.encode(text))) == text.encode()
    assert llama3.warnings(text, special=True) == []


@pytest.mark.parametrize("character", ["^", " ", "\ud800", "a"], ids=["carets", "spaces", "surrogates", "letters"])
def test_a_million_of_one_character_take_linear_time(tokenizer: Tokenizer, character: str) -> None:
    """Four times the text takes four times as long; quadratic time would take sixteen times."""

    def seconds(n: int) -> float:
        times = []
        for _ in range(2):  # the minimum, which other load affects least
            start = time.thread_time()
            ids = tokenizer.encode(character * n)
            times.append(time.thread_time() - start)
            assert 1 <= len(ids) <= 3 * n
        return min(times)

    assert seconds(1_000_000) < 9 * seconds(250_000) + 0.05


@many
@given(text=broken_texts | st.text(st.characters(exclude_categories=())))
@example(text="\ud83d\ude42")
@example(text="\ude42\ud83d")
@example(text="\ud83d\ud83d\ude42a\ud83d")
def test_surrogates_become_what_they_stand_for(llama3: Tokenizer, text: str) -> None:
    """A pair becomes its character, a lone surrogate U+FFFD; nothing else changes."""
    paired = re.sub(
        "[\ud800-\udbff][\udc00-\udfff]",
        lambda pair: chr(0x10000 + (ord(pair[0][0]) - 0xD800 << 10) + ord(pair[0][1]) - 0xDC00),
        text,
    )
    clean = re.sub("[\ud800-\udfff]", "\ufffd", paired)
    assert replace_surrogates(text) == clean
    assert llama3.encode(text) == llama3.encode(clean)
    assert llama3.decode(llama3.encode(text)) == clean


def test_a_lone_surrogate_is_said(llama3: Tokenizer) -> None:
    """The model's input differs from the typed text, so there is a warning."""
    assert llama3.warnings("a\ud800b") == [
        "The prompt contains invalid Unicode; each such character was read as U+FFFD."
    ]
    assert llama3.warnings("a\ufffdb") == []


def test_a_joined_pair_is_no_loss(llama3: Tokenizer) -> None:
    """A surrogate pair is read as its character, so there is no warning."""
    assert llama3.encode("\ud83d\ude42") == llama3.encode("🙂")
    assert llama3.warnings("\ud83d\ude42") == []


# --- Ids → text -------------------------------------------------------------------------------


def test_bytes_that_are_no_character_are_shown_as_escapes(llama3: Tokenizer) -> None:
    r"""Tokens that are parts of a character become `\xNN`; complete characters are unchanged."""
    parts = llama3.encode("\U00013080")  # a hieroglyph of four bytes that no single token covers
    assert len(parts) > 1
    shown = "".join(map(llama3.token_text, parts))
    assert shown == r"\xf0\x93\x82\x80"
    assert llama3.decode(parts) == "\U00013080"
    assert llama3.decode(parts[:-1]) == "\ufffd"
    for byte in range(128, 256):
        assert llama3.token_text(llama3._encoding.encode_single_token(bytes([byte]))) == f"\\x{byte:02x}"
    assert llama3.token_text(llama3.encode("é")[0]) == "é"
    assert llama3.token_text(128009) == "<|eot_id|>"


@pytest.mark.parametrize("id", [-1, 128_256, 10**12])
def test_an_id_outside_the_vocabulary_is_refused(llama3: Tokenizer, id: int) -> None:
    """The error has the valid range, in every function that takes an id."""
    for ask in (
        lambda: llama3.decode([9906, id]),
        lambda: llama3.token_text(id),
        lambda: llama3.token_bytes(id),
        lambda: StreamDecoder(llama3).push(id),
    ):
        with pytest.raises(UsageError, match=f"^{id} is not a token id of this model; ids go from 0 to 128255"):
            ask()


def test_no_id_goes_beyond_the_vocabulary(smollm2: Tokenizer) -> None:
    """Bytes without a token have internal ids, which must never be returned."""
    assert smollm2.n_vocab == 49_152
    assert max(smollm2.encode("".join(map(chr, range(0x100))))) < 49_152
    with pytest.raises(UsageError, match="49152 is not a token id"):
        smollm2.decode([49_152])


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = StreamDecoder(tokenizer)
    return [stream.push(id, final=i == len(ids) - 1) for i, id in enumerate(ids)]


@many
@given(text=texts)
@example(text="👩‍👩‍👧🇫🇷 𓂀")
def test_a_stream_gives_whole_characters_as_soon_as_they_are_whole(llama3: Tokenizer, text: str) -> None:
    """After each token, all complete characters have been returned, and no partial one."""
    ids = llama3.encode(text)
    given_out = ""
    for i, part in enumerate(streamed(llama3, ids), start=1):
        given_out += part
        so_far = b"".join(map(llama3.token_bytes, ids[:i]))
        assert given_out == so_far.decode(errors="ignore")  # only an incomplete character at the end is ignored
    assert given_out == text


@many
@given(ids=st.lists(st.integers(0, 128_255) | st.integers(94, 255) | st.sampled_from([128_000, 128_009]), max_size=30))
def test_a_stream_of_any_ids_sums_to_their_text(llama3: Tokenizer, ids: list[int]) -> None:
    """Also if the bytes are not valid UTF-8, which sampling can produce."""
    assert "".join(streamed(llama3, ids)) == llama3.decode(ids)


def test_a_stream_holds_a_character_back_until_it_is_whole(llama3: Tokenizer) -> None:
    """If the stream ends with an incomplete character, it becomes U+FFFD."""
    ids = llama3.encode("\U00013080")
    parts = streamed(llama3, ids)
    assert parts == [""] * (len(ids) - 1) + ["\U00013080"]
    stream = StreamDecoder(llama3)
    assert stream.push(ids[0]) == ""
    assert stream.push(ids[0], final=True) == "\ufffd\ufffd"


# --- The file ---------------------------------------------------------------------------------


def line(number: int) -> bytes:
    return tokenizer_file().splitlines()[number - 1]


def replaced(number: int, *lines: bytes) -> bytes:
    """The small tokenizer's file with one line replaced."""
    good = tokenizer_file().splitlines()
    return b"\n".join([*good[: number - 1], *lines, *good[number:]]) + b"\n"


BROKEN = {
    "not base64": (replaced(270, b"!!!! 269"), r", line 270: found '!!!! 269'"),
    "half of base64": (replaced(270, b"dG 269"), r", line 270: found 'dG 269'"),
    "more than base64": (replaced(270, b"eH*l6 269"), r", line 270: found 'eH\*l6 269'"),
    "no rank": (replaced(270, b"dGg="), r", line 270: found 'dGg='"),
    "a word for a rank": (replaced(270, b"eHl6 many"), r", line 270: found 'eHl6 many'"),
    "a third field": (replaced(270, line(270) + b" 7"), r", line 270: found '.* 269 7'"),
    "a rank twice": (replaced(270, b"eHl6 268"), r", line 270: .* expected .* the rank 269"),
    "a rank left out": (replaced(270), r", line 270: found '.* 270', expected .* the rank 269"),
    "ranks exchanged": (replaced(270, line(271), line(270)), r", line 270: "),
    "a rank with a sign": (replaced(270, b"eHl6 +269"), r", line 270: found 'eHl6 \+269'"),
    "a negative rank": (replaced(1, b"AA== -1"), r", line 1: "),
    "a token twice": (replaced(270, line(3).split()[0] + b" 269"), r", line 270: "),
    "an empty token": (replaced(270, b"= 269"), r", line 270: "),
    "an empty line in the middle": (replaced(270, line(270), b""), r", line 271: found ''"),
    "cut short in a line": (tokenizer_file()[:-12], r", line 299: found 'bGk= 2'"),
    "cut short at a line": (
        b"\n".join(tokenizer_file().splitlines()[:200]),
        r" has no token for byte 0xc8",
    ),
    "empty": (b"", r" has no token for byte 0x00"),
    "a web page": (b"<!DOCTYPE html>\n<html><body>Access denied</body></html>\n", " is a web page"),
    "binary": (bytes(range(256)) * 10, r", line 1: "),
}


@pytest.mark.parametrize(("data", "says"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_file_is_refused_with_its_name_and_line(tmp_path: Path, data: bytes, says: str) -> None:
    """The error has the file, the line, the expected content and the advice."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + says) as refused:
        Tokenizer.from_meta(str(path))
    assert str(refused.value).endswith("Fetch the file again from where the model came from.")
    assert "\n" not in str(refused.value)


def test_a_whole_file_is_read_whatever_ends_its_lines() -> None:
    """The table above damages this file."""
    for data in (tokenizer_file(), tokenizer_file().rstrip(b"\n"), tokenizer_file().replace(b"\n", b"\r\n")):
        tokenizer = parse_tokenizer_model(data)
        assert tokenizer.n_vocab == 300 + 256
        assert tokenizer.encode("then") == [256, 264]


def test_a_replaced_file_is_read_again(tmp_path: Path) -> None:
    """tiktoken's own loader caches files by path forever, so it would not notice a repaired file."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer_file())
    assert Tokenizer.from_meta(str(path)).encode("th") == [256]
    lines = tokenizer_file().splitlines()
    lines[256] = base64.b64encode(b"zz") + b" 256"
    path.write_bytes(b"\n".join(lines))
    assert Tokenizer.from_meta(str(path)).encode("th") == [ord("t"), ord("h")]
    assert Tokenizer.from_meta(str(path)).encode("zz") == [256]


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    """A directory without the file is an error too."""
    with pytest.raises(ModelNotFoundError, match=r"There is no tokenizer at .*/tokenizer\.model"):
        Tokenizer.from_meta(str(tmp_path / "tokenizer.model"))
    with pytest.raises(ModelNotFoundError, match="is a directory"):
        Tokenizer.from_meta(str(tmp_path))


def test_a_vocabulary_without_a_byte_needs_an_unknown_token() -> None:
    """Otherwise some texts could not be encoded."""
    ranks = {bytes([byte]): byte for byte in range(255)}
    with pytest.raises(CheckpointError, match="no token for the byte 0xff and no unknown token"):
        Tokenizer(ranks, {"<unk>": 255}, r"\S+|\s+")
    assert Tokenizer(ranks, {"<unk>": 255}, r"\S+|\s+", unknown="<unk>").encode("a") == [97]


# --- SmolLM2 ----------------------------------------------------------------------------------

# Bytes without a token in SmolLM2's vocabulary. Below 192 they are control characters; 241 and 242
# begin the characters U+40000 to U+BFFFF, and the others never occur in UTF-8.
LACKING = {4, 6, 19, 20, 22, 29, 192, 193, 241, 242, *range(245, 256)}


@pytest.fixture(scope="module")
def huggingfaces(smollm2_path: Path) -> Encode:
    """The `tokenizers` package with the vocabulary and merges that the gguf package reads from the file."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer as HuggingFaces
    from tokenizers import models, pre_tokenizers

    fields = GGUFReader(smollm2_path).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    built = HuggingFaces(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=[(left, right) for left, right in map(str.split, merges)],
            unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"].contents()],
            fuse_unk=False,
        )
    )
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])

    def encode(text: str) -> list[int]:
        ids: list[int] = built.encode(text, add_special_tokens=False).ids
        return ids

    return encode


@pytest.mark.slow
@many
@given(text=texts.filter(lambda text: LACKING.isdisjoint(text.encode())))
@example(text="a  1")
@example(text="x  12  345\n\n 6")
def test_smollm2_has_the_ids_of_hugging_faces_tokenizer(smollm2: Tokenizer, huggingfaces: Encode, text: str) -> None:
    """For any text whose bytes all have a token."""
    assert smollm2.encode(text) == huggingfaces(text)
    assert smollm2.decode(smollm2.encode(text)) == text
    assert smollm2.warnings(text, special=True) == []


@many
@given(text=st.lists(st.sampled_from(UNWRITTEN) | st.sampled_from(FRAGMENTS), max_size=12).map("".join))
def test_smollm2_reads_what_it_lacks_as_unknown(smollm2: Tokenizer, huggingfaces: Encode, text: str) -> None:
    """As in Hugging Face's tokenizer: one unknown token per byte, and the surrounding text unchanged."""
    assert smollm2.encode(text) == huggingfaces(text)
    assert bool(smollm2.warnings(text, special=True)) == (not LACKING.isdisjoint(text.encode()))


def test_smollm2_lacks_21_bytes_and_says_so(smollm2: Tokenizer) -> None:
    """tiktoken panics on them, with an exception that is not a subclass of `Exception`."""
    held = {byte for id in range(17, smollm2.n_vocab) for byte in smollm2.token_bytes(id)}
    assert set(range(256)) - held == LACKING
    assert len(LACKING) == 21
    for character in UNWRITTEN:
        assert len(smollm2.encode(character)) == len(character.encode())
        assert smollm2.encode(character)[0] == 0
    assert smollm2.encode("a\x04b") == [*smollm2.encode("a"), 0, *smollm2.encode("b")]
    assert smollm2.warnings("a\x04b") == ["The prompt contains bytes without a token; each was read as <|endoftext|>."]


def test_smollm2_takes_each_digit_alone(smollm2: Tokenizer) -> None:
    """A step that transformers drops: with it, the two spaces are one token and the digit is another."""
    assert smollm2.encode("a  1") == [81, 256, 33]
    assert len(smollm2.encode("123456789")) == 9


def test_smollm2_has_no_beginning_of_text(smollm2: Tokenizer) -> None:
    """The model was trained without one."""
    assert smollm2.bos_id is None
    assert smollm2.encode("Hello", bos=True) == smollm2.encode("Hello")
    assert smollm2.encode("", bos=True) == []


def test_smollm2_stops_where_a_text_or_a_turn_ends(smollm2: Tokenizer) -> None:
    """A stop token that is typed is plain text."""
    assert smollm2.stop_ids == {smollm2.special_tokens[name] for name in ("<|endoftext|>", "<|im_end|>")}
    assert smollm2.encode("<|im_end|>", special=True) == [2]
    assert 2 not in smollm2.encode("<|im_end|>")


def test_a_limit_ends_tokenizing_early(llama3: Tokenizer) -> None:
    """But only once there are more ids than the limit."""
    text = "a b " * 300_000
    ids = llama3.encode(text)
    assert llama3.encode(text, limit=len(ids)) == ids
    few = llama3.encode(text, limit=1_000)
    assert 1_000 < len(few) < len(ids)
    assert few[:1_000] == ids[:1_000]
    assert llama3.max_token_bytes == 128
