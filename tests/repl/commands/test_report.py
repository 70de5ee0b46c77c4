"""/report: the main views of a text in one file."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from llama_scratch.errors import LlamaScratchError, UsageError
from llama_scratch.llama import Llama
from llama_scratch.microscope.lens import lens
from llama_scratch.render.page import written
from llama_scratch.render.report_page import ReportPage
from llama_scratch.repl.commands import run_command
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Settings
from llama_scratch.sampling import GREEDY

HOSTILE = "</script><script>alert(1)</script> “capital” of \u202e &amp;"


@pytest.fixture(scope="module")
def llama(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture
def session(llama: Llama) -> Session:
    console = Console(file=io.StringIO(), width=80)
    return Session(Loading.ended_with(llama), console, Settings(5, 0, GREEDY), lambda *_: llama)


def report(session: Session, path: Path) -> str:
    """Run /report and return the page."""
    _, reply = run_command(session, f"/report {path}")
    assert reply is not None
    assert reply.facts["path"] == str(path)
    return path.read_text()


def test_it_holds_every_part_of_the_examination(session: Session, tmp_path: Path) -> None:
    prediction = session.predict("The capital of France is")
    page = report(session, tmp_path / "page.html")
    headings = re.findall(r"<summary><h2[^>]*>(.*?)</h2>", page)
    assert headings[:4] == ["Next-token prediction", "Surprisal", "Logit lens", "Attribution"]
    assert any(heading.startswith("Attention of L") for heading in headings)
    assert headings[-1] == "Attention heads"
    view = session.state.page
    assert isinstance(view, ReportPage)
    assert view.title == "What comes after “The capital of France is”"
    assert view.finding.text.startswith(written(prediction.next.text, token=True))
    assert view.parts[0] == view.finding


def test_the_picture_has_the_numbers_of_the_lens(session: Session, tmp_path: Path) -> None:
    session.predict("The capital of France is")
    report(session, tmp_path / "page.html")
    assert isinstance(session.state.page, ReportPage)
    stream, expected = session.state.page.stream, lens(session.llama, session.ids)
    assert stream.ranks == tuple(row.guesses[-1].rank_of_answer for row in expected.layers)
    for values, row in zip(stream.heatmap.values, expected.layers, strict=True):
        assert values == pytest.approx([guess.probability for guess in row.guesses], rel=1e-4)


def test_every_head_that_is_named_has_a_link_arcs_and_a_target(session: Session, tmp_path: Path) -> None:
    session.predict("The capital of France is")
    page = report(session, tmp_path / "page.html")
    links = set(re.findall(r'<a href="#(L[^"]+)" data-head', page))
    targets = re.findall(r'id="(L[^"]+)"', page)
    assert links
    assert links <= set(targets)
    assert len(targets) == len(set(targets))
    # Names without a link are only in the titles of sections and maps, and in examples that this network lacks.
    body = page[page.index("<main>") : page.index("<footer>")]
    body = re.sub(r"(?s)<summary>.*?</summary>|<figcaption>.*?</figcaption>|<output.*?</output>|<a .*?</a>", "", body)
    assert isinstance(session.state.page, ReportPage)
    heads = {arcs.head for arcs in session.state.page.stream.arcs}
    assert not heads & set(re.findall(r"L\d+\.H\d+", re.sub(r"<[^>]*>", "", body)))


def test_a_text_in_it_is_a_text(session: Session, tmp_path: Path) -> None:
    """The page escapes the prompt, so it cannot inject HTML."""
    session.predict(HOSTILE)
    page = report(session, tmp_path / "page.html")
    assert "<script>alert" not in page
    assert "\u202e" not in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)


def test_a_changed_network_is_examined_as_it_is(session: Session, tmp_path: Path) -> None:
    session.predict("The capital of France is")
    run_command(session, "/ablate L0.H0")
    page = report(session, tmp_path / "page.html")
    assert isinstance(session.state.page, ReportPage)
    assert session.state.page.finding.text.startswith("With -L0.H0: ")
    assert page.count("With -") == 2  # the sentence, and the prediction before and after


@pytest.mark.parametrize("name", ["page.txt", "page.png", "page", "nowhere/page.html", ""])
def test_a_file_that_cannot_be_written_is_a_sentence(session: Session, tmp_path: Path, name: str) -> None:
    session.predict("The capital")
    with pytest.raises(LlamaScratchError):
        run_command(session, f"/report {tmp_path / name if name else ''}")


def test_what_is_there_stays(session: Session, tmp_path: Path) -> None:
    """The error comes before any computation."""
    (tmp_path / "page.html").write_text("mine")
    session.predict("The capital")
    with pytest.raises(LlamaScratchError, match="already exists"):
        run_command(session, f"/report {tmp_path / 'page.html'}")
    assert (tmp_path / "page.html").read_text() == "mine"


def test_without_a_text_there_is_nothing_to_examine(session: Session, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text yet"):
        run_command(session, f"/report {tmp_path / 'page.html'}")
    assert not list(tmp_path.iterdir())
