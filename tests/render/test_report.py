"""The sentence and the picture of a report."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from llama_scratch.microscope.attribution import Attribution, Contribution, TokenInfluence
from llama_scratch.microscope.lens import Guess, Layer, Lens
from llama_scratch.microscope.summary import Ablation, Link, Summary
from llama_scratch.render import stream
from llama_scratch.render.page import Finding, Page, Paragraph
from llama_scratch.render.pages.report import finding, page
from llama_scratch.render.report_page import ReportPage, Section
from llama_scratch.render.to_html import html
from llama_scratch.results import Candidate, Token

TOKENS = (Token(1, "The"), Token(2, " sky"), Token(3, " is"))
BLUE, RED = Candidate(7, " blue", math.log(0.8)), Candidate(8, " red", math.log(0.1))
LINKS = {"L0.H0": (Link(0, 0.9),), "L1.H2": (Link(1, 0.6), Link(0, 0.3)), "L2.H1": ()}


def lens(*ranks: int) -> Lens:
    """A lens with these ranks of the answer at the last of the three tokens."""
    layers = []
    for layer, rank in enumerate(ranks, start=-1):
        best = BLUE if rank == 1 else RED
        other = Guess(RED.id, RED.text, RED.logprob, 1)
        layers.append(Layer(layer, (other, other, Guess(best.id, best.text, best.logprob, rank))))
    return Lens(TOKENS, 0, 3, tuple(layers))


def summary(*ablations: tuple[str, float], ranks: tuple[int, ...] = (900, 40, 1, 1)) -> Summary:
    """Measurements with these ablations."""
    contributions = tuple(Contribution(name, 1.0) for name, _ in ablations)
    influences = tuple(TokenInfluence(token, i, 0.0, None, None, None) for i, token in enumerate(TOKENS))
    why = Attribution(TOKENS, BLUE, None, 10.0, contributions, 0.0, influences, ())
    return Summary(lens(*ranks), why, tuple(Ablation(*each) for each in ablations), LINKS)


def report(view: Summary) -> ReportPage:
    """A report with two sections."""
    sections = (
        Section(Page("Attribution", (Finding("It is L1.H2."), Paragraph("L0.H0, L2.ffn and L9.H9.")), ("why",))),
        Section(Page("Attention of L1.H2", (Paragraph("P"),)), "L1.H2"),
    )
    return page(view, "The sky is", (BLUE, RED), sections)


# --- The sentence -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (summary(("L1.H2", 0.1)), "␣sky is read by head L1.H2 at ␣is (60.0 % of its attention)"),
        (summary(("L1.H2", 0.1)), "without this head, ␣blue falls to 10.0 %; ␣blue is the top prediction from layer 1"),
        (summary(("L1.ffn", 0.05), ("L1.H2", 0.4)), "read by head L1.H2"),  # exactly half
        (summary(("L2.H1", 0.2)), "Head L2.H1 matters at ␣is, where its attention is spread over many tokens"),
        (summary(("L1.ffn", 0.05), ("L1.H2", 0.5)), "No single head"),
        (summary(("L1.ffn", 0.05), ("L1.H2", 0.5)), "without L1.ffn, ␣blue falls to 5.0 %"),
        (
            summary(("L1.ffn", 0.9), ("L1.H2", 0.5)),
            "No single component explains it: without L1.H2, ␣blue still has 5",
        ),
        (summary(), "no component is singled out"),
        (summary(("L1.H2", 0.1), ranks=(1, 1, 1, 1)), "from the embedding on"),
    ],
)
def test_the_sentence_says_what_the_numbers_support(view: Summary, words: str) -> None:
    sentence = finding(view)
    assert sentence.startswith("␣blue, 80.0 %. ")
    assert words in sentence
    assert sentence.endswith(".")


def test_a_head_that_reads_several_tokens_does_not_read_one() -> None:
    view = replace(summary(("L1.H2", 0.1)), links=LINKS | {"L1.H2": (Link(1, 0.4), Link(0, 0.35))})
    assert "is read by" not in finding(view)
    assert "its largest attention goes to ␣sky (40.0 %)" in finding(view)


def test_a_lens_of_another_answer_is_not_part_of_the_sentence() -> None:
    """Rounding can give a narrow prediction another top token."""
    assert "top prediction" not in finding(summary(("L1.H2", 0.1), ranks=(9, 9, 9, 2)))


# --- The picture ------------------------------------------------------------------------------


def test_the_picture_shows_the_head_that_matters() -> None:
    assert report(summary(("L1.H2", 0.1))).stream.shown == "L1.H2"
    assert report(summary(("L1.H2", 0.7))).stream.shown == ""


def test_the_fields_of_the_picture() -> None:
    values = stream.values(report(summary(("L1.H2", 0.1))).stream)
    rows = values["rows"]
    assert [row["label"] for row in rows] == ["L2", "L1", "L0", "emb"]
    assert [row["rank"] for row in rows] == ["1", "1", "40", "900"]
    last = [row["fields"][-1] for row in rows]
    assert ["leads" in field["names"] for field in last] == [True, True, False, False]
    assert last[0]["text"] == "␣blue 80.0 %"
    assert [field["share"] for field in last] == [0.8, 0.8, 0.1, 0.1]
    assert last[2]["hover"] == "At ␣is after layer 0, ␣red is the top prediction: 10.0 %. ␣blue has rank 40."
    # Equal predictions of adjacent layers have one text.
    assert [row["fields"][0]["text"] for row in rows] == ["", "", "␣red", ""]


def test_arcs_lead_from_the_token_to_the_last_one() -> None:
    arcs = {each["head"]: each for each in stream.values(report(summary(("L1.H2", 0.1))).stream)["arcs"]}
    assert arcs["L2.H1"]["paths"] == []
    assert arcs["L2.H1"]["hover"] == "Head L2.H1: its attention is spread over many tokens."
    assert arcs["L1.H2"]["hover"] == "Head L1.H2: ␣is looks at ␣sky 60.0 %, The 30.0 %."
    wide, narrow = arcs["L1.H2"]["paths"]
    assert wide["width"] > narrow["width"]
    # Layer 1 of 3, above the embedding: from the row of layer 0 to the row of layer 1.
    assert re.fullmatch(r"M1\.5 2\.5C.* 2\.5 1\.5", wide["path"])


def test_a_long_text_shows_its_end() -> None:
    many = tuple(Token(i, f" t{i}") for i in range(40))
    view = summary(("L1.H2", 0.1))
    layers = tuple(Layer(row.layer, row.guesses[:1] * 39 + row.guesses[-1:]) for row in view.lens.layers)
    view = replace(
        view, lens=Lens(many, 10, 50, layers), attribution=replace(view.attribution, tokens=many[:10] + many)
    )
    picture = report(view).stream
    assert picture.heatmap.columns == tuple(f" t{i}" for i in range(8, 40))
    assert "last 32 of 50 tokens" in picture.heatmap.title
    assert picture.arcs[1].links == ((-1, 0.6), (-1, 0.3))


# --- On the page ------------------------------------------------------------------------------


def test_the_page_begins_with_the_sentence_and_folds_the_rest() -> None:
    text = html(report(summary(("L1.H2", 0.1))))
    assert text.index("The sky is <b>␣blue</b>") < text.index('class="finding"') < text.index("<svg")
    assert text.index("<svg") < text.index("<details>") < text.index("Attribution")
    assert "<summary><h2>Attribution</h2><p>It is L1.H2.</p></summary>" in text
    assert '<details id="L1.H2">' in text


def test_a_report_shows_the_end_of_a_long_prompt() -> None:
    view = replace(report(summary(("L1.H2", 0.1))), prompt="a\n" * 500 + "The sky is")
    heading = re.search(r'<h1 class="prompt">(.*?) <b>', html(view))
    assert heading is not None
    assert len(heading[1]) == 160
    assert heading[1].startswith("…")
    assert heading[1].endswith(" a The sky is")


def test_names_are_links_only_if_they_have_a_target() -> None:
    text = html(report(summary(("L1.H2", 0.1))))
    assert '<a href="#L0.H0" data-head="L0.H0" data-hover="Head L0.H0: ␣is looks at The 90.0 %.">L0.H0</a>' in text
    assert ">L9.H9<" not in text
    assert "L2.ffn and L9.H9." in text
    assert "<a " not in html(Page("A page", (Paragraph("L1.H2"),)))
