"""/tokens, /surprisal, /tree, /diff, /choices, /compare: arguments, answers, display."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import RenderableType

from llama_scratch.errors import ModelNotFoundError, UsageError
from llama_scratch.llama import Llama
from llama_scratch.microscope.choices import Choice, Choices
from llama_scratch.microscope.compare import ComparedToken, Comparison, ModelPrediction
from llama_scratch.microscope.diff import Diff, Pair
from llama_scratch.microscope.surprisal import Scored, Surprisal
from llama_scratch.microscope.tokens import Piece, Tokens
from llama_scratch.microscope.tree import Branch, Tree, tree
from llama_scratch.render import to_plain, to_terminal
from llama_scratch.render.drawings.icicle import Icicle
from llama_scratch.render.page import Page
from llama_scratch.render.pages import choices as choices_page
from llama_scratch.render.pages import compare as compare_page
from llama_scratch.render.pages import diff as diff_page
from llama_scratch.render.pages import surprisal as surprisal_page
from llama_scratch.render.pages import tokens as tokens_page
from llama_scratch.render.pages import tree as tree_page
from llama_scratch.render.surprise import surprise_style
from llama_scratch.repl.commands import completions, run_command
from llama_scratch.repl.commands.arguments import split_at_bars
from llama_scratch.repl.session import Session
from llama_scratch.results import Candidate, ModelInfo, Token
from tests.helpers.sessions import assert_sentence, run, shown, started

PROMPT = "The opposite of hot is"


@pytest.fixture(scope="module")
def llama(smollm2_fp32_path: Path) -> Llama:
    return Llama.load(smollm2_fp32_path, precision="fp32", device="cpu")


@pytest.fixture
def session(llama: Llama) -> Session:
    """A session whose text is `PROMPT`."""
    session = started(llama)
    session.predict(PROMPT)
    return session


# --- Answers ----------------------------------------------------------------------------------


def test_tokens_of_a_text_and_of_the_one_so_far(session: Session) -> None:
    facts = run(session, "/tokens Hello,  you")
    assert [(token["text"], token["bytes"]) for token in facts["tokens"]] == [
        ("Hello", "48656c6c6f"),
        (",", "2c"),
        (" ", "20"),
        (" you", "20796f75"),
    ]
    assert [token["id"] for token in facts["tokens"]] == session.llama.encode("Hello,  you")
    assert [token["id"] for token in run(session, "/tokens")["tokens"]] == session.ids
    assert len(session.state.snapshots) == 1


def test_tokens_know_special_ones_where_the_session_does(session: Session) -> None:
    assert len(run(session, "/tokens <|im_end|>")["tokens"]) > 1
    session.change_settings(special=True)
    assert [token["text"] for token in run(session, "/tokens <|im_end|>")["tokens"]] == ["<|im_end|>"]


def test_surprisal_of_a_text_and_of_the_one_so_far(session: Session) -> None:
    facts = run(session, "/surprisal The capital of France is Paris")
    paris = facts["tokens"][-1]
    assert (paris["text"], paris["rank"], round(paris["probability"], 3)) == (" Paris", 1, 0.773)
    assert paris["bits"] == pytest.approx(-math.log2(paris["probability"]))
    assert facts["tokens"][0]["bits"] is None
    assert facts["bits"] == pytest.approx(sum(token["bits"] for token in facts["tokens"][1:]))
    assert len(facts["next"]) == 5
    assert [token["id"] for token in run(session, "/surprisal")["tokens"]] == session.ids


def test_a_tree_is_three_by_three_unless_told_otherwise(session: Session) -> None:
    facts = run(session, "/tree")
    assert (facts["width"], facts["depth"], len(facts["branches"])) == (3, 3, 3)
    assert facts["branches"][0]["text"] == " cold"
    assert [token["id"] for token in facts["tokens"]] == session.ids
    other = run(session, "/tree 2x1")
    assert [branch["children"] for branch in other["branches"]] == [[], []]


def test_a_path_walks_into_its_branch_and_two_points_walk_out(session: Session) -> None:
    """The branch becomes the text, and Enter continues from there."""
    before = session.ids
    branch = run(session, "/tree")["branches"][0]
    inner = branch["children"][1]
    facts = run(session, "/tree 1.2")
    assert session.ids == [*before, branch["id"], inner["id"]]
    assert session.state.offered == (facts["branches"][0]["id"],)
    assert [b["id"] for b in facts["branches"]] == [b["id"] for b in inner["children"]]
    deeper = run(session, "/tree 2x2 1")
    assert (deeper["width"], deeper["depth"]) == (2, 2)
    assert session.ids == [*before, branch["id"], inner["id"], facts["branches"][0]["id"]]
    run(session, "/tree ..")
    assert session.ids == [*before, branch["id"], inner["id"]]
    assert run(session, "/tree 3x3 ..")["branches"][0]["id"] == branch["id"]
    assert session.ids == before


def test_a_tree_that_is_interrupted_leaves_the_text_as_it_was(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Covers both a path and '..'."""
    run(session, "/tree 1x1 1")
    moments = session.state.snapshots
    next_logits = session.llama.engine.next_logits
    for line in ("/tree 1", "/tree .."):
        calls = 0

        def interrupted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return next_logits(*arguments)

        monkeypatch.setattr(session.llama.engine, "next_logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_command(session, line)
        assert session.state.snapshots == moments


def test_a_diff_of_two_texts(session: Session) -> None:
    facts = run(session, "/diff The capital of France is | The capital of Germany is")
    assert [token["text"] for token in facts["first"]][-2:] == [" France", " is"]
    assert [token["text"] for token in facts["second"]][-2:] == [" Germany", " is"]
    assert facts["first_top"][0]["text"] == " Paris"
    assert facts["second_top"][0]["text"] == " Berlin"
    assert facts["parting"]["token"]["text"] == " is"
    assert 0.1 < facts["jsd_bits"] < 1
    quoted = run(session, r'/diff "a\nb | c " | d')
    assert "".join(token["text"] for token in quoted["first"]) == "a\nb | c "


def test_choices_get_a_space_in_front_unless_they_are_quoted(session: Session) -> None:
    facts = run(session, r'/choices  cold |very  cold| "\n" | "x | y"')
    assert [choice["text"] for choice in facts["choices"]] == [" cold", " very  cold", "\n", "x | y"]
    assert facts["choices"][0]["normalized"] > 0.99
    assert sum(choice["normalized"] for choice in facts["choices"]) == pytest.approx(1)
    assert sum(choice["by_length"] for choice in facts["choices"]) == pytest.approx(1)
    cold = next(c.probability for c in session.llama.predict(PROMPT).top if c.text == " cold")
    assert facts["choices"][0]["probability"] == pytest.approx(cold, abs=1e-5)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a | b", ["a", "b"]),
        ("a|b|", ["a", "b", ""]),
        ("", [""]),
        ("|", ["", ""]),
        ('"a | b" | c', ['"a | b"', "c"]),
        (r'"a \" | b"|c', [r'"a \" | b"', "c"]),
        ('"a" b | "c', ['"a" b', '"c']),
        ('5" | 6"', ['5"', '6"']),
        ('a | "b|"', ["a", '"b|"']),
    ],
)
def test_bars_part_texts_but_not_within_quotes(argument: str, expected: list[str]) -> None:
    assert list(split_at_bars(argument)) == expected


@pytest.mark.slow
def test_compare_with_another_precision(session: Session) -> None:
    """Each side uses its precision, and the session's model is unchanged."""
    facts = run(session, "/compare int8")
    assert [facts[side]["model"]["precision"] for side in ("first", "second")] == ["fp32", "int8"]
    assert 0 < facts["kl_bits"] < 0.1
    assert facts["compared"][0]["text"] == " cold"
    assert session.llama.info.precision == "fp32"


def test_compare_with_another_model(session: Session, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another vocabulary, given by path. The model is closed after the comparison."""
    closed: list[Llama] = []
    monkeypatch.setattr(Llama, "close", lambda llama: closed.append(llama))
    facts = run(session, f"/compare {tiny_dir}")
    assert facts["second"]["model"]["name"] == tiny_dir.name
    assert facts["kl_bits"] is None
    assert [llama.info.name for llama in closed] == [tiny_dir.name]


# --- Invalid arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/tree 0x3", "0x3"),
        ("/tree 11x1", "11x1"),
        ("/tree 3x7", "3x7"),
        ("/tree 10x4", "at most 1,000 leaves"),
        ("/tree three", "Invalid argument 'three' for /tree"),
        ("/tree 3x", "Invalid argument '3x'"),
        ("/tree 3x31.2", "for /tree"),
        ("/tree 1..2", "for /tree"),
        ("/tree " + "9" * 5000, "for /tree"),
        ("/tree 1.0", "Branch 1.0 does not exist"),
        ("/tree 11", "Branch 11 does not exist"),
        ("/tree 1.1.1.1.1.1.1", "at most 6 numbers"),
        ("/tree ..", "cannot go back"),
        ("/diff", "needs an argument"),
        ("/diff one text", "Give two texts"),
        ("/diff a | b | c", "Give two texts"),
        ("/diff a |", "Give two texts"),
        ('/diff a | ""', "Give two texts"),
        ("/choices", "needs an argument"),
        ("/choices cold", "Give two or more texts"),
        ("/choices cold | | hot", "Give two or more texts"),
        ('/choices cold | ""', "Give two or more texts"),
        ("/compare", "needs an argument"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(session: Session, line: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        run_command(session, line)
    assert said in str(raised.value)
    assert_sentence(raised.value)
    assert len(session.state.snapshots) == 1


def test_a_model_that_is_not_there(session: Session) -> None:
    with pytest.raises(ModelNotFoundError) as raised:
        run_command(session, "/compare /no/such/model")
    assert_sentence(raised.value)


@pytest.mark.parametrize("line", ["/tokens", "/surprisal", "/tree", "/tree 1", "/choices a | b", "/compare int8"])
def test_without_a_text_there_is_nothing_to_look_into(llama: Llama, line: str) -> None:
    with pytest.raises(UsageError, match="There is no text yet") as raised:
        run_command(started(llama), line)
    assert_sentence(raised.value)


def test_completions(session: Session) -> None:
    assert completions(session, "/compare f") == ["/compare fp32", "/compare fp16"]
    assert "/compare smollm2" in completions(session, "/compare ")
    assert "/tree 3x3" in completions(session, "/tree ")
    assert "/tree .." not in completions(session, "/tree ")
    run(session, "/tree 1x1 1")
    assert completions(session, "/tree .") == ["/tree .."]


# --- Display ----------------------------------------------------------------------------------

# Texts that terminals hide, interpret, or draw wider than one cell.
NASTY = (" Paris", "\n\n", "\x1b[31m", "東京の天気は", "-" * 90, "\u202e\u200b", "[bold]", "\\xe2", "\x9b2J", " ")


def nasty_candidates(n: int = len(NASTY)) -> tuple[Candidate, ...]:
    return tuple(Candidate(100_000 + i, text, -1.5 * (i + 1)) for i, text in enumerate(NASTY[:n]))


def branches(depth: int) -> tuple[Branch, ...]:
    return tuple(
        Branch(c.id, c.text, c.logprob, depth * c.logprob, c.text == " ", branches(depth - 1) if depth > 1 else ())
        for c in (nasty_candidates()[::4] if depth < 6 else nasty_candidates())
    )


def comparison(*names: str, kl_bits: float | None = 0.25) -> Comparison:
    a, b = nasty_candidates()[:5], tuple(Candidate(c.id, c.text, c.logprob - 1) for c in nasty_candidates()[3:8])
    sides = [
        ModelPrediction(ModelInfo(name, "gguf", precision, "cpu", 1), (), top, 3.5)
        for name, precision, top in zip(names, ("fp32", "int8"), (a, b), strict=True)
    ]
    rows = [ComparedToken(c.text, c, None) for c in a[:3]] + [ComparedToken(c.text, a[3], c) for c in b]
    return Comparison(sides[0], sides[1], tuple(rows), kl_bits)


def a_diff() -> Diff:
    first = tuple(Token(i, text) for i, text in enumerate(NASTY))
    second = (*first[:4], Token(77, "東京"), *first[6:], Token(78, "the end"))
    best, other = nasty_candidates()[2:4]
    aligned = [(i, i) for i in range(4)] + [(i, i - 1) for i in range(6, 10)]
    pairs = [Pair(i, j, first[i], 0.1 * j, best, best if i < 4 else other) for i, j in aligned]
    return Diff(first, second, 4, tuple(pairs), nasty_candidates(5), nasty_candidates(5), 0.875)


def everything() -> dict[str, tuple[RenderableType, RenderableType]]:
    """Build each view with hostile texts, and its plain form."""
    nasty = nasty_candidates()
    pieces = Tokens(tuple(Piece(c.id, c.text, c.text.encode()) for c in nasty))
    tokens = tuple(
        Scored(c.id, c.text, c.logprob * i if i else None, i**6 if i else None, 1.0) for i, c in enumerate(nasty)
    )
    scored = Surprisal(tokens, nasty, 2.5)
    text, bits = "".join(NASTY), [token.bits for token in tokens for _ in token.text]
    tree = Tree((), 10, 6, branches(6))
    choices = Choices(tuple(Choice(c.text, (c,), 1 / (i + 1), 1 - 0.1 * i) for i, c in enumerate(nasty)))
    long = comparison("A model with a name that is long", "An-other-model-with-a-name-that-is-longer", kl_bits=None)
    first = Surprisal(tokens[:1], nasty, 2.5)
    pages = {
        "tokens": tokens_page.page(pieces),
        "surprisal": surprisal_page.page(scored, text, bits),
        "surprisal of one": surprisal_page.page(first, NASTY[0], [None] * 6),
        "tree": tree_page.page(tree, text),
        "choices": choices_page.page(choices),
        "diff": diff_page.page(a_diff()),
        "compare": compare_page.page(comparison("Model", "Model")),
        "compare others": compare_page.page(long),
    }
    return {name: (to_terminal.view(page), to_plain.plain(page)) for name, page in pages.items()}


VIEWS = everything()


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_fits_its_terminal(name: str, width: int) -> None:
    """Widths are in cells, two per Chinese character. Only the tree truncates texts, in its icicle."""
    from rich.cells import cell_len

    for view in VIEWS[name]:
        text = shown(view, width)
        assert max(map(cell_len, text.splitlines())) <= width
        assert ("…" in text) == (name == "tree")


@pytest.mark.parametrize("name", VIEWS)
def test_nothing_in_a_text_is_obeyed_or_hidden(name: str) -> None:
    """Escapes control characters and rich markup. The only escape codes are 16 colors, and 24-bit surprisal."""
    import re

    for view in VIEWS[name]:
        text = shown(view, 300)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
        assert "[bold]" in text or name == "surprisal of one"
        assert "\u202e" not in text
        colored = shown(view, 300, force_terminal=True, color_system="truecolor")
        colored = re.sub(r"[34]8;2;\d+;\d+;\d+", "30", colored)
        codes = {code for found in re.findall(r"\x1b\[([\d;]*)m", colored) for code in found.split(";")}
        assert codes <= {"0", "1", "2", "4", *(str(color) for color in range(30, 38))}


@pytest.mark.parametrize("name", VIEWS)
def test_a_plain_view_has_no_drawing(name: str) -> None:
    """It has no colors either, because screen readers read it."""
    text = shown(VIEWS[name][1], 200, force_terminal=True, color_system="truecolor")
    assert "\x1b" not in text
    assert not [char for char in text if 0x2500 <= ord(char) < 0x2600]
    assert "\n\n" not in text


@pytest.mark.parametrize(
    "line",
    ["/tokens", "/surprisal", "/tree 2x2", "/diff a b | a c", "/choices a | b", "/compare fp16"],
)
def test_a_plain_session_gets_the_plain_view(session: Session, line: str) -> None:
    session.change_settings(plain=True)
    reply = run_command(session, line)[1]
    assert reply is not None
    assert reply.view is not None
    text = shown(reply.view, 200)
    assert not [char for char in text if 0x2500 <= ord(char) < 0x2600]
    assert '"' in text
    session.change_settings(plain=False)
    other = run_command(session, line)[1]
    assert other is not None
    assert other.view is not None
    assert shown(other.view, 200) != text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tokens", ['id 100000, bytes 20 50 61 72 69 73, text " Paris"', "10 tokens for 142 bytes."]),
        (
            "surprisal",
            [
                'token " Paris", not predicted',
                'token "\\n\\n", prob. 5.0 %, rank 1, bits 4.3',
                "bits for 9 tokens",
            ],
        ),
        ("surprisal of one", ["The first token is not predicted, so there is nothing to score."]),
        (
            "tree",
            [
                'branch 1, token " Paris", probability 22.3 %\n',
                'branch 1.1.1.1.1.1, token " Paris", probability 22.3 %, path 22.3 %\n',
                'branch 10, token " ", probability <0.1 %, the text ends\n',
            ],
        ),
        ("choices", ['choice " Paris", share 100.0 %, per token 100.0 %, 1 token']),
        (
            "diff",
            [
                "3 tokens shared\n",
                'in both, token "東京の天気は", JSD 0.30, first "\\u001b[31m", second same\n',
                'only in the first, token "-----',
                'in both, token " ", JSD 0.80, first "\\u001b[31m", second "東京の天気は"\n',
                'only in the second, token "the end"\n',
                'after the first " Paris", 22.3 %, after the second " Paris", 22.3 %\n',
                "diverge by 0.88 of at most 1 bit",
            ],
        ),
        (
            "compare",
            [
                'token " Paris", fp32 22.3 %, its top prediction, not in the vocabulary of int8\n',
                "KL divergence (fp32 ‖ int8): 0.25 bits.",
            ],
        ),
        ("compare others", ["first: A model with a name that is long in fp32", "compared by their text"]),
    ],
)
def test_plain_views_say_everything(name: str, expected: list[str]) -> None:
    text = shown(VIEWS[name][1], 200)
    for part in expected:
        assert part in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tokens", ["100000  20 50 61 72 69 73", "␣Paris", r"\n\n", "10 tokens for 142 bytes."]),
        ("surprisal", [r"␣Paris\n\n", "Bits: under 1 · under 4 · under 8 · more", "5.0 %", "4.3"]),
        ("tree", ["├── 1 ␣Paris 22.3 %\n", "1.1.1.1.1.1 ␣Paris 22.3 % (22.3 %)\n", "10 ␣ <0.1 % end\n"]),
        ("choices", ["100.0 %", "per token", "████"]),
        ("diff", ["3 tokens shared", "-  ", "+  東京", "+  the␣end", "same", "predictions first differ after"]),
        ("compare", ["▸ 22.3 %", "no token", "Entropies: 3.50 and 3.50 bits."]),
        ("compare others", ["second: An-other-model-with-a-name-that-is-longer in int8"]),
    ],
)
def test_views_show_everything(name: str, expected: list[str]) -> None:
    text = "\n".join(line.rstrip() for line in shown(VIEWS[name][0], 120).splitlines())
    for part in expected:
        assert part in text


def test_choices_are_sorted_best_first() -> None:
    """The order of the arguments does not matter."""
    given = [
        Choice(text, (Candidate(1, text, logprob),), 0.3, 0.3) for text, logprob in (("b", -2), ("a", -1), ("c", -3))
    ]
    page = choices_page.page(Choices(tuple(given)))
    for view in (to_terminal.view(page), to_plain.plain(page)):
        lines = shown(view, 80).splitlines()
        rows = [line.removeprefix("choice").strip(' "')[:1] for line in lines if line.count("30.0") == 2]
        assert rows == ["a", "b", "c"]


def test_what_surprises_more_has_another_style() -> None:
    """Four styles; the default style if nothing was predicted."""
    styles = [surprise_style(bits) for bits in (0.0, 0.99, 1.0, 3.99, 4.0, 7.99, 8.0, 30.0)]
    assert styles[::2] == styles[1::2]
    assert len(set(styles)) == 4
    assert surprise_style(None) == ""


def test_the_text_is_colored_by_its_bits() -> None:
    """Each character is colored by its own bits."""
    tokens = (Scored(1, "ab", None, None, None), Scored(2, "cd", -math.log(2) * 9, 3, 1.0))
    page = surprisal_page.page(Surprisal(tokens, (), 1.0), "abcd", [None, None, 0.5, 9.0])
    text = shown(to_terminal.view(page), 80, force_terminal=True, color_system="standard")
    assert "abc\x1b[1;7md\x1b[0m" in text


@pytest.mark.parametrize("form", [to_terminal.view, to_plain.plain])
def test_one_token_is_a_token(form: Callable[[Page], RenderableType]) -> None:
    assert "1 token for 1 byte." in shown(form(tokens_page.page(Tokens((Piece(1, "a", b"a"),)))), 40)


def test_the_tree_s_sentence_names_the_most_probable_path() -> None:
    """It is not the path of the most probable tokens, and its probability is that of the whole path."""

    def branch(text: str, probability: float, before: float, *children: Branch) -> Branch:
        return Branch(1, text, math.log(probability), math.log(probability * before), False, children)

    wide = branch(" a", 0.6, 1, branch(" b", 0.3, 0.6), branch(" c", 0.2, 0.6))
    narrow = branch(" d", 0.3, 1, branch(" e", 0.9, 0.3), branch(" f", 0.05, 0.3))
    sentence = tree_page.finding(Tree((), 2, 2, (wide, narrow)))
    assert "␣a is the most probable next token, 60.0 %" in sentence
    assert "␣d ␣e, 27.0 % for all 2 tokens" in sentence
    assert "2 first tokens have 90.0 %" in sentence
    assert tree_page.finding(Tree((), 1, 1, (branch(" a", 0.6, 1),))) == "␣a is the most probable next token, 60.0 %."


def test_the_tree_of_a_known_text(smollm2_path: Path) -> None:
    """The sentence and the icicle say the same as `/predict` and `/tree --json`."""
    llama = Llama.load(smollm2_path, precision="fp32", device="cpu")
    found = tree(llama, "The capital of France is", 3, 2)
    page = tree_page.page(found, "The capital of France is")
    assert "␣Paris is the most probable next token, 77.3 %" in tree_page.finding(found)
    (icicle,) = (part for part in page.parts if isinstance(part, Icicle))
    paris = icicle.rows(1000, 10)[1][0]
    assert paris.branch is not None
    assert (paris.branch.name, paris.branch.label, paris.right) == ("1", "␣Paris", 773)
    assert [child.share for child in paris.branch.children] == [b.path_probability for b in found.branches[0].children]
