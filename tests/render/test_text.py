"""Answers as users and programs read them: terminal text, plain text, lines and JSON."""

from __future__ import annotations

import io
import json
import math
import unicodedata

import pyte
import pytest
from rich.console import Console, RenderableType
from wcwidth import iter_graphemes

from llama_scratch.render import answer, bars, lines, reports, text
from llama_scratch.render.text import Wrapped, as_text, percent, readable, visible
from llama_scratch.results import Candidate, Generated, ModelInfo, Prediction, PromptWarning, Timing, Token, as_json

MODEL = ModelInfo("Tiny", "meta", "fp32", "cpu", 1234)


def prediction(*texts: str, warnings: tuple[str, ...] = ()) -> Prediction:
    """A prediction whose candidates have the probabilities 1/2, 1/4, 1/8, …"""
    top = tuple(Candidate(id, text, -(id + 1) * math.log(2)) for id, text in enumerate(texts))
    timing = Timing(load_s=1.5, prompt_tokens=4, reused_tokens=3, prefill_s=0.0123)
    tokens, cautions = (Token(7, "My"), Token(8, " name")), tuple(PromptWarning("a cause", text) for text in warnings)
    return Prediction("My name", tokens, top[0], top, 1.75, cautions, MODEL, timing)


def shown(renderable: RenderableType, width: int = 80, encoding: str = "utf-8") -> str:
    """Render for a terminal without colors."""
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
    assert visible(text).plain == expected


def test_running_text_keeps_its_lines_and_loses_its_escapes() -> None:
    assert readable("a\n\tb \x1b[2J\x07 é日") == "a\n\tb \\x1b[2J\\x07 é日"


@pytest.mark.parametrize(
    ("probability", "expected"),
    [(1.0, "100.0 %"), (0.9996, ">99.9 %"), (0.9994, "99.9 %"), (0.7731, "77.3 %"), (0.0004, "<0.1 %"), (0.0, "0.0 %")],
)
def test_a_percentage_never_claims_certainty(probability: float, expected: str) -> None:
    assert percent(probability) == expected


def test_an_answer_shows_token_probability_bar_and_what_it_took() -> None:
    text = shown(answer.answer(prediction(" Paris", "\n", " the", warnings=("Mind the gap.",))))
    rows = [line.replace("│", " ").split() for line in text.splitlines() if "%" in line]
    assert [row[:3] for row in rows] == [["␣Paris", "50.0", "%"], [r"\n", "25.0", "%"], ["␣the", "12.5", "%"]]
    assert [len(row[3]) for row in rows] == [20, 10, 5]
    assert "entropy 1.75 bits · 4 tokens, 3 cached · 12 ms" in text
    assert "Mind the gap." in text


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_an_answer_fits_its_terminal(width: int) -> None:
    text = shown(
        answer.answer(prediction(" Paris" * 20, "\x00" * 30, warnings=("A sentence of some length. " * 5,))), width
    )
    assert max(map(len, text.splitlines())) <= width


def test_a_terminal_without_unicode_gets_ascii_bars() -> None:
    assert "#" * 20 in shown(bars.Bar(0.5), encoding="ascii")


def test_the_plain_answer_is_words() -> None:
    text = answer.plain_answer(prediction(" Paris", '"', warnings=("Mind the gap.",)))
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


def squeezed(line: str) -> str:
    """Normalize a line, and remove the blank cells that pyte adds after wide characters."""
    return unicodedata.normalize("NFC", line).replace(" ", "")


def streamed(text: str, width: int, cut: int, begin: str = " …") -> list[str]:
    """Stream a text to a terminal in pieces. Its lines are the same as those of `Wrapped.text`, which are returned."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    wrapped = Wrapped(width, begin, indent=" ")
    console.print(begin, end="")
    for i in range(0, len(text), cut):
        written = wrapped.push(text[i : i + cut], final=i + cut >= len(text))
        if written:
            console.print(*written, sep="", end="", soft_wrap=True)
    screen = pyte.Screen(width, 20)
    pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    shown = [line.rstrip() for line in screen.display]
    expected = wrapped.text.rstrip().split("\n")
    assert list(map(squeezed, shown[: len(expected)])) == list(map(squeezed, expected))
    assert not any(shown[len(expected) :])
    return expected


@pytest.mark.parametrize("cut", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            " Paris is famous for its landmarks,\nsuch as the Eiffel Tower and 日本語 words",
            [" … Paris is famous", " for its landmarks,", " such as the Eiffel", " Tower and 日本語", " words"],
        ),
        (" exactly nine teen and more", [" … exactly nine teen", " and more"]),
        # 。 and ） and ー never begin a line, and “ and （ never end one.
        ("你好，世界。这是一个没有空格的“长”句子", [" …你好，世界。这是一", " 个没有空格的“长”句", " 子"]),
        ("あいうえおかきく（けこ）さしすせそたデーター", [" …あいうえおかきく", " （けこ）さしすせそ", " たデーター"]),
        (" to http://a.b/c?d=e&f=g", [" … to", " http://a.b/c?d=e&f=", " g"]),
        ("x" * 40, [" …" + "x" * 18, " " + "x" * 19, " xxx"]),
        (" a\N{NO-BREAK SPACE}bcdefghijklmnopq rst", [" …", " a\N{NO-BREAK SPACE}bcdefghijklmnopq", " rst"]),
        ("\na\tb", [" …", " a      b"]),
        (" 🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉", [" … 🎉🎉🎉🎉🎉🎉🎉🎉", " 🎉🎉"]),
    ],
)
def test_running_text_wraps_however_it_comes(text: str, lines: list[str], cut: int) -> None:
    assert streamed(text, 20, cut) == lines


@pytest.mark.parametrize(
    "text", ["语言模型", "日本語です", "สวัสดี", "🎉🦙👍", "https://a.b/c", "aGVsbG8gd29ybGQ", "a b"]
)
def test_no_more_than_one_character_is_held_back(text: str) -> None:
    wrapped = Wrapped(80)
    for count, char in enumerate(text, start=1):
        wrapped.push(char)
        held = text[len(wrapped.text) : count]
        assert wrapped.text + held == text[:count]
        assert len(list(iter_graphemes(held))) <= 1
        assert held == "" or not held.isascii()


def test_a_character_of_several_code_points_is_written_in_one_piece() -> None:
    family, flag, accent = "👩\u200d👩\u200d👧", "🇩🇪", "e\u0301"
    wrapped = Wrapped(80)
    pieces = [written for char in f"{family}{flag}" for written in wrapped.push(char)]
    pieces += wrapped.push("", final=True)
    assert [str(piece) for piece in pieces] == [family, flag]
    wrapped = Wrapped(20, " …", indent=" ")
    for char in accent * 20:
        wrapped.push(char)
    wrapped.push("", final=True)
    assert wrapped.text == f" …{accent * 18}\n {accent * 2}"


def test_a_window_that_becomes_narrower_begins_a_line() -> None:
    wrapped = Wrapped(80, indent=" ")
    wrapped.push("some words of a line")
    assert not wrapped.resize(40)
    assert wrapped.resize(10)
    wrapped.push(" that goes on")
    assert wrapped.text == "some words of a line\n  that\n goes on"


def test_a_window_of_no_width_ends() -> None:
    wrapped = Wrapped(1, indent=" ")
    wrapped.push("日本", final=True)
    assert wrapped.text == "日\n 本"


@pytest.mark.parametrize("view", [text.note("word " * 30), answer.answer(prediction(" Paris"))])
def test_lines_that_wrap_keep_their_indentation(view: RenderableType) -> None:
    text = shown(view, 30)
    assert all(line.startswith(" ") for line in text.splitlines() if line)


def test_the_banner_speaks_of_the_keys_that_there_are() -> None:
    assert "Tab" in shown(reports.banner(MODEL, 64))
    assert "Tab" not in shown(reports.banner(MODEL, 64, live=False))
    chat = shown(reports.banner(MODEL, 64, live=False, chat=True))
    assert "message" in chat
    assert "prompt" not in chat
    assert "gray" not in shown(reports.banner(MODEL, 64))


def test_a_view_as_text_keeps_what_looks_like_markup() -> None:
    assert as_text("a [b]c[/b] :smile:") == "a [b]c[/b] :smile:"
