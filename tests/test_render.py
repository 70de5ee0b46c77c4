"""What people and programs read of an answer."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console, RenderableType

from llama_scratch.render import lines, terminal
from llama_scratch.results import Candidate, Caution, Generated, ModelInfo, Prediction, Timing, Token, as_json

MODEL = ModelInfo("Tiny", "meta", "fp32", "cpu", 1234)


def prediction(*texts: str, warnings: tuple[str, ...] = ()) -> Prediction:
    """An answer whose candidates have the probabilities 1/2, 1/4, 1/8, …"""
    top = tuple(Candidate(id, text, -(id + 1) * math.log(2)) for id, text in enumerate(texts))
    timing = Timing(load_s=1.5, prompt_tokens=4, reused_tokens=3, prefill_s=0.0123)
    tokens, cautions = (Token(7, "My"), Token(8, " name")), tuple(Caution("a cause", text) for text in warnings)
    return Prediction("My name", tokens, top[0], top, 1.75, cautions, MODEL, timing)


def shown(renderable: RenderableType, width: int = 80, encoding: str = "utf-8") -> str:
    """What a terminal without colours shows."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    Console(file=out, width=width).print(renderable)
    out.seek(0)
    return "\n".join(line.rstrip() for line in out.read().splitlines())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Paris", "␣Paris"),
        ("\n", r"\n"),
        ("\t\r", r"\t\r"),
        ("   ", "␣␣␣"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\u200b", r"\u200b"),
        ("\u202e", r"\u202e"),
        ("\u00a0", r"\xa0"),
        ("\u0301", "◌\u0301"),
        ("日本", "日本"),
        ("", "(empty)"),
    ],
)
def test_white_space_and_control_characters_are_visible(text: str, expected: str) -> None:
    assert terminal.visible(text).plain == expected


def test_running_text_keeps_its_lines_and_loses_its_escapes() -> None:
    assert terminal.readable("a\n\tb \x1b[2J\x07 é日") == "a\n\tb \\x1b[2J\\x07 é日"


@pytest.mark.parametrize(
    ("probability", "expected"),
    [(1.0, "100.0 %"), (0.9996, ">99.9 %"), (0.9994, "99.9 %"), (0.7731, "77.3 %"), (0.0004, "<0.1 %"), (0.0, "0.0 %")],
)
def test_a_percentage_never_claims_certainty(probability: float, expected: str) -> None:
    assert terminal.percent(probability) == expected


def test_an_answer_shows_token_probability_bar_and_what_it_took() -> None:
    text = shown(terminal.answer(prediction(" Paris", "\n", " the", warnings=("Mind the gap.",))))
    rows = [line.replace("│", " ").split() for line in text.splitlines() if "%" in line]
    assert [row[:3] for row in rows] == [["␣Paris", "50.0", "%"], [r"\n", "25.0", "%"], ["␣the", "12.5", "%"]]
    assert [len(row[3]) for row in rows] == [20, 10, 5]
    assert "entropy 1.75 bits · 4 tokens, 3 reused · 12 ms" in text
    assert "Mind the gap." in text


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_an_answer_fits_its_terminal(width: int) -> None:
    text = shown(
        terminal.answer(prediction(" Paris" * 20, "\x00" * 30, warnings=("A sentence of some length. " * 5,))), width
    )
    assert max(map(len, text.splitlines())) <= width


def test_a_terminal_without_unicode_gets_ascii_bars() -> None:
    assert "#" * 20 in shown(terminal.Bar(0.5), encoding="ascii")


def test_the_plain_answer_is_words() -> None:
    text = terminal.plain_answer(prediction(" Paris", '"', warnings=("Mind the gap.",)))
    assert text.splitlines() == [
        'Next token: " Paris", 50.0 %',
        'Number 2: "\\"", 25.0 %',
        "Entropy 1.75 bits.",
        "Note: Mind the gap.",
    ]


def test_a_line_for_programs_is_token_probability_id() -> None:
    answer = prediction(' "é\t', " the")
    assert lines.answer_lines(answer, all_candidates=False) == ['" \\"é\\t"\t0.5000\t0']
    assert lines.answer_lines(answer, all_candidates=True)[1:] == ['" the"\t0.2500\t1']


def test_json_has_the_fields_of_the_contract() -> None:
    generated = Generated(" is Bob", (5, 6), (-0.1, -0.2), "stop", 0.5)
    answer = json.loads(lines.json_line(as_json(prediction(" Paris", " the", warnings=("w",)), generated)))
    best = {"id": 0, "text": " Paris", "probability": pytest.approx(0.5), "logprob": pytest.approx(-math.log(2))}
    assert answer == {
        "prompt": "My name",
        "tokens": [{"id": 7, "text": "My"}, {"id": 8, "text": " name"}],
        "next": best,
        "top": [best, {"id": 1, "text": " the", "probability": 0.25, "logprob": pytest.approx(-2 * math.log(2))}],
        "entropy_bits": 1.75,
        "generated": {"text": " is Bob", "ids": [5, 6], "logprobs": [-0.1, -0.2], "finish_reason": "stop"},
        "warnings": ["w"],
        "model": {"name": "Tiny", "format": "meta", "precision": "fp32", "device": "cpu", "parameters": 1234},
        "timing": {"load_s": 1.5, "prompt_tokens": 4, "reused_tokens": 3, "prefill_s": 0.0123, "decode_s": 0.5},
    }
    assert "generated" not in as_json(prediction(" Paris"))


@pytest.mark.parametrize("cut", [1, 2, 5, 1000])
def test_running_text_wraps_between_words_however_it_comes(cut: int) -> None:
    text = "Paris is famous for its landmarks,\nsuch as the Eiffel Tower and 日本語 words"
    wrapped = terminal.Wrapped(20, column=3)
    pieces = [wrapped.push(text[i : i + cut]) for i in range(0, len(text), cut)]
    lines = ("".join(pieces) + wrapped.push("", final=True)).split("\n")
    assert lines == ["Paris is famous", "for its landmarks,", "such as the Eiffel", "Tower and 日本語", "words"]


def test_a_word_that_is_wider_than_the_terminal_is_given_out_whole() -> None:
    assert terminal.Wrapped(10).push("a " + "x" * 30, final=True) == "a\n" + "x" * 30
