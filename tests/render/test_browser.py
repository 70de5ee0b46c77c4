"""Web pages in headless Chromium.

It is searched on the PATH, and installed if apt-get works without a password.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llama_scratch.llama import Llama
from llama_scratch.render.page import Cell, Gallery, Page, Running, Table
from llama_scratch.render.to_html import html
from llama_scratch.repl.commands import run_command
from tests.helpers.pages import EVERYTHING, HOSTILE, ramp
from tests.helpers.sessions import started

if TYPE_CHECKING:
    from playwright.sync_api import Browser

sync_api = pytest.importorskip("playwright.sync_api", reason="web pages not tested: playwright is not installed")
PHONE, DESKTOP = 390, 1280
# The views that a report does not contain.
VIEWS = (
    "/tokens", "/tree 2x3", "/lens ranks", "/attention", "/attention L23", "/choices Paris | Rome", "/rope", "/arch",
    "/diff The capital of France is | The capital of Italy is", "/kv", "/kv 5", "/source", "/source attention",
    "/patch The capital of Italy is", "/ablate L23.H4",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """Find Chromium on the PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def install() -> None:
    """Install Chromium with apt-get, if this is root on Linux."""
    if sys.platform == "linux" and shutil.which("apt-get") and os.geteuid() == 0:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command, seconds in (["update"], 60), (["install", "-y", "--no-install-recommends", "chromium"], 150):
            try:
                subprocess.run(
                    ["apt-get", *command], env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                    timeout=seconds, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find() is None:
        install()
    if (path := find()) is None:
        sentence = "Chromium was neither found nor could it be installed: THE WEB PAGES WERE NOT TESTED"
        print(sentence, file=sys.__stderr__)
        pytest.skip(sentence)
    with sync_api.sync_playwright() as playwright:
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()


class Opened:
    """A page opened in the browser without a network, with its requests and console messages."""

    def __init__(self, browser: Browser, path: Path, page: Page, width: int = 1200, scheme: str = "light"):
        path.write_text(html(page))
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            offline=True,
            color_scheme="dark" if scheme == "dark" else "light",
            reduced_motion="reduce",
        )
        self.page = context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())

    @property
    def tip(self) -> str:
        """The tooltip's text; "" if it is hidden."""
        tip = self.page.locator("#tip")
        return tip.text_content() or "" if tip.is_visible() else ""

    def lights(self) -> list[list[int]]:
        """Sum red, green and blue of each pixel of the first canvas, in rows from top to bottom."""
        script = """() => {
            const canvas = document.querySelector('canvas'), {width, height} = canvas;
            return [width, Array.from(canvas.getContext('2d').getImageData(0, 0, width, height).data)];
        }"""
        width, data = self.page.evaluate(script)
        sums = [sum(data[i : i + 3]) for i in range(0, len(data), 4)]
        return [sums[i : i + width] for i in range(0, len(sums), width)]

    def field(self, row: int, column: int) -> tuple[float, float]:
        """The center of a field of the first canvas."""
        place = self.page.evaluate("document.querySelector('canvas').place")
        return place["left"] + (column + 0.5) * place["size"], place["top"] + (row + 0.5) * place["size"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_a_page_opens_without_a_network_and_fits(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, tmp_path / "a.html", EVERYTHING, width, scheme)
    assert opened.requests == [(tmp_path / "a.html").as_uri()]
    assert opened.complaints == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == {
        "light": "rgb(252, 252, 250)",
        "dark": "rgb(23, 24, 29)",
    }.get(scheme)
    opened.page.context.close()


def test_nothing_of_a_prompt_runs(browser: Browser, tmp_path: Path) -> None:
    opened = Opened(browser, tmp_path / "a.html", EVERYTHING)
    assert opened.page.title() == "Everything"
    assert opened.page.locator("script").count() == 2
    assert opened.page.locator("b:not(.track b)").count() == 0
    shown = opened.page.locator(".running").last.inner_text()
    assert shown == HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    # The content security policy would stop a script that got past the escaping.
    opened.page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'var ran = 1'}))")
    assert opened.page.evaluate("typeof ran") == "undefined"
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.page.context.close()


def test_values_are_shown_under_the_pointer_and_by_keys(browser: Browser, tmp_path: Path) -> None:
    drawn = ramp(2, 3, values=((0.0, 0.5, 0.25), (1.0, None, 0.125)), tokens=False)
    texts = ramp(2, 2, texts=((" a", " b"), (" c", " d")))
    bars = Table(("", "x"), ((Cell(" d", token=True), Cell("", bar=0.5, hover="half")),))
    page = Page("Values", (Running((Cell(" Paris", token=True, hover="3 bits"),)), texts, drawn, bars))
    opened = Opened(browser, tmp_path / "a.html", page)
    canvas, press = opened.page.locator("canvas"), opened.page.keyboard.press
    assert opened.tip == ""

    for selector, said in ((".running .t", "3 bits"), (".map td >> nth=3", "r1 · ␣c1: ␣d, 0.75"), ("td.b", "half")):
        opened.page.hover(selector)
        assert opened.tip == said

    x, y = opened.field(0, 1)
    canvas.hover(position={"x": x, "y": y})
    assert opened.tip == "r0 ·  c1: 0.5"
    x, y = opened.field(1, 1)
    canvas.hover(position={"x": x, "y": y})
    assert opened.tip == ""  # an empty field
    # The strongest field is the darkest.
    lights = opened.lights()
    (x0, y0), (x1, y1) = opened.field(0, 0), opened.field(1, 0)
    assert lights[int(y1)][int(x1)] < lights[int(y0)][int(x0)]

    opened.page.focus(".running .t")
    assert opened.tip == "3 bits"
    opened.page.focus(".map td >> nth=0")
    press("ArrowRight")
    press("ArrowDown")
    assert opened.tip == "r1 · ␣c1: ␣d, 0.75"
    canvas.focus()
    press("ArrowRight")
    press("ArrowRight")
    assert opened.tip == "r0 ·  c1: 0.5"
    press("Escape")
    assert opened.tip == ""
    assert opened.complaints == []
    opened.page.context.close()


def test_a_gallery_and_a_table_are_one_tab_stop_each(browser: Browser, tmp_path: Path) -> None:
    rows = tuple((Cell(f"n{i}"), Cell(f"{i} %", bar=i / 4)) for i in range(4))
    maps = Gallery("All", tuple(ramp(3, 3, title=f"m{i}") for i in range(6)))
    page = Page("Stops", (maps, Table(("", ">share"), rows)))
    opened = Opened(browser, tmp_path / "a.html", page)
    press = opened.page.keyboard.press

    def focused() -> str:
        return str(opened.page.evaluate("document.activeElement.ariaLabel"))

    press("Tab")
    assert focused().startswith("m0")
    press("ArrowRight")
    press("ArrowRight")
    assert focused().startswith("m2")
    press("ArrowLeft")
    assert focused().startswith("m1")
    assert opened.tip == ""
    press("Enter")  # into the map
    press("ArrowDown")
    assert opened.tip == "r1 · ␣c0: 0.333"
    assert focused().startswith("m1")
    press("Escape")
    press("ArrowLeft")
    assert focused().startswith("m0")
    press("Tab")
    assert opened.tip == "n0: share 0 %."
    press("ArrowDown")
    assert opened.tip == "n1: share 1 %."
    press("Shift+Tab")
    assert focused().startswith("m0")
    assert opened.complaints == []
    opened.page.context.close()


# --- Views of a real model --------------------------------------------------------------------


@pytest.fixture(scope="module")
def views(smollm2_fp32_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """The page of each view, and of a report, on the fact of docs/fact.md."""
    session = started(Llama.load(smollm2_fp32_path, precision="fp32", device="cpu"))
    session.predict("The capital of France is")
    pages = {}
    for line in (f"/report {tmp_path_factory.mktemp('report') / 'a.html'}", *VIEWS):
        run_command(session, line)
        assert session.state.page is not None
        pages[line.split(" ")[0] if "/report" in line else line] = session.state.page
    return pages


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_no_view_scrolls_sideways(browser: Browser, tmp_path: Path, views: dict[str, Page], width: int) -> None:
    for line, view in views.items():
        opened = Opened(browser, tmp_path / "a.html", view, width)
        opened.page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width, line
        assert opened.complaints == [], line
        opened.page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "bound"), [(PHONE, 8000), (DESKTOP, 4000)])
def test_a_report_is_short_and_begins_with_the_answer(
    browser: Browser, tmp_path: Path, views: dict[str, Page], width: int, bound: int, scheme: str
) -> None:
    opened = Opened(browser, tmp_path / "a.html", views["/report"], width, scheme)
    assert opened.page.evaluate("document.documentElement.scrollHeight") <= bound
    for text in (opened.page.locator("h1 b"), opened.page.locator(".finding")):
        assert "␣Paris" in text.inner_text()
        box = text.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < 700
    top, bottom = opened.page.evaluate(
        "(({top, bottom}) => [top, bottom])(document.querySelector('.stream').getBoundingClientRect())"
    )
    assert top < 400
    assert bottom - top > 300
    opened.page.context.close()


def test_a_head_in_a_report_shows_its_arcs_and_links_to_its_section(
    browser: Browser, tmp_path: Path, views: dict[str, Page]
) -> None:
    opened = Opened(browser, tmp_path / "a.html", views["/report"], DESKTOP)

    def arcs() -> list[str]:
        script = "all => all.filter(g => getComputedStyle(g).visibility == 'visible').map(g => g.dataset.arcs)"
        return list(opened.page.eval_on_selector_all(".arcs g", script))

    assert arcs() == ["L23.H4"]
    assert "␣France 90.3 %" in opened.page.locator(".looks").inner_text()
    other = opened.page.locator('aside a[href^="#L29.H"]').first
    other.hover()
    assert arcs() == [other.inner_text()]
    assert opened.tip.startswith(f"Head {other.inner_text()}: ␣is looks at")
    opened.page.locator("h1").hover()
    assert arcs() == ["L23.H4"]
    opened.page.locator('.finding a[href="#L23.H4"]').click()
    section = opened.page.locator('details[id="L23.H4"]')
    assert section.get_attribute("open") == ""
    assert section.locator("canvas").first.bounding_box()["height"] > 50  # type: ignore[index]
    assert section.bounding_box()["y"] < 400  # type: ignore[index]
    assert opened.complaints == []
    opened.page.context.close()
