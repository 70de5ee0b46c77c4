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

from llama_scratch.render.page import Cell, Page, Running, Table
from llama_scratch.render.to_html import html
from tests.helpers.pages import EVERYTHING, HOSTILE, ramp

if TYPE_CHECKING:
    from playwright.sync_api import Browser

sync_api = pytest.importorskip("playwright.sync_api", reason="web pages not tested: playwright is not installed")
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
            viewport={"width": width, "height": 800}, offline=True, color_scheme="dark" if scheme == "dark" else "light"
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
