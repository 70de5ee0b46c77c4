"""Texts for comparing tokenizers: random strings, code and many scripts."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

CORPUS = (Path(__file__).parent / "corpus.txt").read_text(encoding="utf-8")
# Tokenizers differ in runs of white space, digits, quotes, letters of other scripts and emoji.
FRAGMENTS = [
    *[" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", "\u00a0", "\u3000", "\u2028", "\x1c", "\x0b", "\u200b"],
    *["0", "12", "345", "6789", "3.14", "1,000", "٣٤", "½", "²", "Ⅷ", "𝟘", "七"],
    *[".", "...", "!?", "'", "''", '"', "“", "—", "_", "$", "#!", "{}", "</", "&&", "€", "\\n", "^^"],
    *["'s", "'S", "'t", "'re", "'VE", "'m", "'Ll", "'d", "'x", "’s", "'ſ", "I'm", "don't", "WE'RE"],
    *[" the", "Hello", "a", "É", "e\u0301", "ß", "Ω", "ж", "שלום", "مرحبا", "नमस्ते", "ไทย", "K", "ǅ"],
    *["漢字", "かな", "カナ", "한국어", "。", "，"],
    *["🙂", "👩‍👩‍👧", "🇫🇷", "✊🏿", "❤️", "\ufe0f", "\u0301"],
    *["<|eot_id|>", "<|begin_of_text|>", "<|endoftext|>", "<|", "|>", "<|im_end|>"],
]
# Twenty distinct short texts per draw, because a draw takes longer than the code under test.
drawn = st.lists(
    st.text(min_size=1, max_size=12) | st.lists(st.sampled_from(FRAGMENTS), min_size=2, max_size=8).map("".join),
    min_size=20,
    max_size=20,
    unique=True,
)
UNWRITTEN = [*"\x04\x06\x13\x14\x16\x1d", "\U00040000", "\U0008abcd", "\U000bffff"]
