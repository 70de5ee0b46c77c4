"""Pages on a terminal, as plain text, as HTML and as pictures."""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from dataclasses import replace
from textwrap import dedent
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from llama_scratch.errors import UsageError
from llama_scratch.render import colors, to_plain, to_terminal
from llama_scratch.render.code import highlighted
from llama_scratch.render.page import (
    Cell,
    Code,
    Gallery,
    Heatmap,
    Page,
    PageBlock,
    Paragraph,
    Running,
    Table,
    Window,
    written,
)
from llama_scratch.render.pooling import pooled, pooling
from llama_scratch.render.scale import Scale
from llama_scratch.render.text import figure
from llama_scratch.render.to_html import html
from llama_scratch.render.to_png import png
from tests.helpers.pages import EVERYTHING, HOSTILE, SIGNED, TABLE, ramp, with_texts

FILE = """def f():
    \"\"\"Return one.

    return is a word here
    \"\"\"
    return 1
"""


def test_an_excerpt_is_colored_as_in_its_file() -> None:
    """It begins inside a docstring. Lexed alone, its first line would be code and its last one a string."""
    excerpt = dedent("\n".join(FILE.splitlines()[3:6]))
    inside, quotes, code = highlighted(Code(excerpt, "a.py", 4, (3,), FILE))
    assert [line.plain for line in (inside, quotes, code)] == excerpt.splitlines()
    assert {str(span.style) for span in inside.spans} == {str(span.style) for span in quotes.spans}
    assert {str(span.style) for span in code.spans} != {str(span.style) for span in inside.spans}
    alone = highlighted(Code(excerpt, "a.py", 4, (3,)))
    assert [line.spans for line in alone] != [line.spans for line in (inside, quotes, code)]


def test_every_renderer_names_the_marked_line() -> None:
    part = Code("a = 1\nb = 2\nc = 3", "a.py", 4, (3,))
    assert "a.py:6" in shown(part)
    assert "a.py:6" in html(Page("t", (part,)))
    assert "a.py, line 6:" in to_plain.plain(Page("t", (part,))).plain
    assert replace(part, marked=()).location == "a.py:4"


def shown(*parts: PageBlock, width: int = 80, source: tuple[str, ...] = (), encoding: str = "utf-8", **how: Any) -> str:
    """Render blocks for a terminal."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", write_through=True)
    Console(file=out, width=width, **how).print(to_terminal.view(Page("", parts, source)), highlight=False)
    out.seek(0)
    return "\n".join(line.rstrip() for line in out.read().splitlines())


def plain(*parts: PageBlock) -> list[str]:
    """Render blocks for a screen reader."""
    return to_plain.plain(Page("", parts)).plain.splitlines()


# --- On a terminal ----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    text = shown(*EVERYTHING.parts, width=width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_paragraphs_and_running_text() -> None:
    text = shown(Paragraph("[bold]as it is"), EVERYTHING.parts[2])
    assert "[bold]as it is" in text
    assert "After ␣Paris\\n" in text


def test_the_source_is_named_where_there_is_one() -> None:
    assert "Source: /source lens, /source rope" in shown(Paragraph("x"), source=("lens", "rope"))
    assert "Source" not in shown(Paragraph("x"))


def test_a_table_has_bars_to_both_sides_and_counts_what_it_leaves_out() -> None:
    lines = shown(TABLE, width=60).splitlines()
    assert [line.split() for line in lines[1:3]] == [["A", "table"], ["name", "number", "bar"]]
    left, right = lines[3].split("│")
    assert "█" in left
    assert "█" not in right
    assert "and 3 more" in lines[5]
    whole = shown(replace(TABLE, scroll=0), width=60).splitlines()
    left, right = whole[7].split("│")
    assert "█" not in left
    assert "█" in right


def test_a_column_of_nothing_but_bars_gives_way_on_a_narrow_terminal() -> None:
    rows = tuple((Cell("a word or two"), Cell("0.50"), Cell("", bar=share)) for share in (0.1, 0.9))
    table = Table(("token", ">share", ""), rows)
    assert "█" in shown(table, width=40)
    narrow = shown(table, width=26)
    assert "█" not in narrow
    assert narrow.count("a word or two") == 2
    named = shown(replace(table, columns=("token", ">share", "bar")), width=26)
    assert "bar" in named  # a column with a name stays


def test_bars_grow_in_eighths() -> None:
    def bar(share: float) -> str:
        return shown(Table(("a",), ((Cell("", bar=share),),)), width=43).splitlines()[2].strip()

    assert bar(1.0) == "█" * 40
    assert bar(0.5) == "█" * 20
    assert bar(1 / 320) == "▏"
    assert "#" in shown(Table(("a",), ((Cell("", bar=1.0),),)), encoding="latin-1")


def test_source_has_its_lines_numbered_and_marked() -> None:
    lines = shown(EVERYTHING.parts[9]).splitlines()
    assert lines[1] == " llama_scratch/model.py:42"
    assert re.fullmatch(r" +41 def f\(\):", lines[2])
    assert re.fullmatch(r" ❱ 42 +return 1", lines[3])


def test_a_map_with_texts_shows_the_columns_that_fit_and_how_to_see_others() -> None:
    heatmap = with_texts(30, window=Window(more="/lens {}"))
    last = shown(heatmap)
    assert "␣t029" in last
    assert "␣t00 " not in last
    assert "positions 20 to 29 of 30; /lens 10 shows earlier ones" in last
    first = shown(replace(heatmap, window=Window(0, "/lens {}")))
    assert "␣t00 " in first
    assert "positions 0 to 9 of 30; /lens 10 shows later ones" in first
    middle = shown(replace(heatmap, window=Window(11, "/lens {}")))
    assert "positions 11 to 20 of 30; /lens 1 shows earlier ones, /lens 21 shows later ones" in middle
    assert shown(replace(heatmap, window=Window(29, "/lens {}"))) == last
    assert "/" not in shown(with_texts(4, window=Window(more="/lens {}")))  # all of it is there


def test_a_map_says_its_values_by_shapes() -> None:
    rows = shown(ramp(1, 5, values=((0.0, 0.05, 0.2, 0.6, None),))).splitlines()
    assert rows[-2] == " r0   ··░░▓▓"
    rows = shown(SIGNED).splitlines()
    assert rows[-3:] == [" r0 ≣≣==", " r1   ▒▒██", " -1 ≣≡=-‐ 0 ·░▒▓█ 1"]


def test_labels_stand_upright_above_their_columns() -> None:
    lines = shown(ramp(1, 2, columns=(" ab", "日c"))).splitlines()
    assert [line.strip() for line in lines[2:4]] == ["a 日", "b c"]


def test_a_map_that_is_far_too_large_is_pooled() -> None:
    values = tuple(tuple(0.0 for _ in range(2000)) for _ in range(2000))
    values = (*values[:1999], (*values[0][:1999], 1.0))  # one field that must survive
    text = shown(ramp(1, 1, rows=2000 * ("r",), columns=2000 * ("c",), values=values))
    assert len(text.splitlines()) < 60
    assert text.count("█") == 3  # two in the field, one in the legend
    assert "2,000 × 2,000 values, max-pooled" in text


def test_small_maps_stand_beside_each_other() -> None:
    gallery = EVERYTHING.parts[8]
    lines = shown(gallery, width=80).splitlines()
    assert lines[3].split() == [word for i in range(6) for word in ("head", str(i))]
    assert sum("head" in line for line in shown(gallery, width=30).splitlines()) == 4


# --- As plain text ----------------------------------------------------------------------------


def test_plain_lines_hold_every_fact_and_no_drawing() -> None:
    lines = to_plain.plain(EVERYTHING).plain.splitlines()
    text = "\n".join(lines)
    assert not re.search("[▀-▟─-╿·]", text)
    assert 'After " Paris\\n"' in lines
    assert '" Paris": 3 bits' in lines
    assert 'name n4, number 4, bar " a"' in lines  # all rows
    assert 'r1: " c0": 0.25; " c1": 0.312; " c2": 0.375; " c3": 0.438' in lines
    assert 'r2: " c22": " t222" 0.911' in text
    assert "positions 22 to 29 of 30; /lens 14 shows earlier ones" in lines
    assert "42 (here):     return 1" in lines
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_plain_lines_say_what_they_leave_out() -> None:
    """A map without a command for other columns shows all of them. Small maps are pooled, with a note."""
    one = replace(with_texts(30), rows=("r0",), values=(30 * (0.5,),), texts=(30 * ("x",),), window=Window(0))
    (_, row) = plain(one)
    assert row.count("0.5") == 30
    assert plain(with_texts(30, window=Window(0, "/lens {}")))[-1] == (
        "positions 0 to 7 of 30; /lens 8 shows later ones"
    )
    small, large = ramp(4, 4), ramp(20, 20)
    assert plain(Gallery("Maps", (large, large)))[-1].startswith("20 × 20 values, max-pooled")
    assert "strongest" not in " ".join(plain(Gallery("Maps", (small,))))


def test_plain_lines_leave_out_what_a_table_says_better() -> None:
    piece = Cell(" Paris", token=True, hover="3 bits")
    assert plain(Running((piece,), spoken=False), Table(("token", ""), ((piece, Cell("-", said="gone")),))) == [
        'token " Paris", gone'
    ]
    assert "␣Paris" in shown(Running((piece,), spoken=False))


# --- Values -----------------------------------------------------------------------------------


def test_pooling_keeps_the_strongest_of_each_block() -> None:
    heatmap = ramp(4, 4, values=((0, 0, 0, 0), (0, -3, 2, 0), (0, 0, None, 0), (1, 0, 0, 0)), scale=Scale(-3.0))
    small = pooled(heatmap, 2, 2)
    assert small.values == ((-3, 2), (1, 0))
    assert small.rows == ("r0", "r2")
    assert re.search("4 × 4 values.* 2 × 2", pooling(heatmap, small))
    assert re.search("4 × 4 values.* 2 × 1", pooling(heatmap, pooled(heatmap, 3, 4)))
    assert pooled(heatmap, 4, 9) is heatmap
    assert pooling(heatmap, heatmap) == ""


def test_levels_of_values() -> None:
    assert [Scale(1.0, 5.0).level(value) for value in (0.0, 7.0, None, float("nan"))] == [0.0, 1.0, None, None]
    assert [SIGNED.scale.level(value) for value in (-1.0, -0.5, 0.0)] == [-1.0, -0.5, 0.0]


def test_texts_hide_nothing() -> None:
    assert written(" a\n\x1b\u202e", token=True) == "␣a\\n\\x1b\\u202e"
    assert written(" a\n\x1b\u202e") == " a\n\\x1b\\u202e"
    assert [figure(value) for value in (0.12345, 12345.6, -2.0)] == ["0.123", "12,346", "-2"]


def test_parts_may_be_empty() -> None:
    nothing = Heatmap("A map", (), (), ())
    parts: tuple[PageBlock, ...] = (nothing, replace(nothing, texts=()), replace(nothing, rows=("r",), values=((),)))
    parts += Table(("a", ">b"), ()), Gallery("All", ()), Gallery("One", (nothing,)), Running(()), Paragraph("")
    page = Page("", (*parts, Code("", "a.py", 1)))
    assert "A map" in shown(*page.parts)
    assert "A map:" in plain(*page.parts)
    assert html(page).count("<canvas") == 3
    assert png(page)


def test_a_long_title_is_cut() -> None:
    assert Page("a\n\u202e" + 500 * "b", ()).headline == "a \\u202e" + 151 * "b" + "…"
    assert f"<h1>{159 * 'c'}…</h1>" in html(Page(200 * "c", ()))


def test_scales_can_be_told_apart_without_colors() -> None:
    for scales, sign in ((colors.LIGHT, -1), (colors.DARK, 1)):
        for stops in scales.values():
            lights = [sign * colors.luminance(color) for color in colors.steps(stops)]
            assert lights == sorted(lights)


# --- As HTML ----------------------------------------------------------------------------------


def test_a_web_page_needs_nothing_and_runs_nothing_else() -> None:
    page = html(EVERYTHING)
    assert not re.search(r"(?:src|href)=\"(?!#)|https?:|@import|url\(", page)
    assert page.count("<script") == 2
    assert "default-src 'none'" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    maps = json.loads(re.search(r'id="maps">(.*?)</script>', page)[1])  # type: ignore[index]
    assert maps[1]["values"] == [[-1.0, -0.5, 0.0], [None, 0.5, 1.0]]
    assert maps[-1]["rows"] == [written(HOSTILE)]
    assert "<h2>Second</h2>" in page
    assert "/source lens, /source attention" in page
    assert "Made by llama-scratch" in page


def test_a_large_map_on_a_web_page_is_pooled() -> None:
    page = html(Page("", (ramp(300, 600),)))
    maps = json.loads(re.search(r'id="maps">(.*?)</script>', page)[1])  # type: ignore[index]
    assert [len(maps[0][name]) for name in ("rows", "columns", "values")] == [256, 256, 256]
    assert "300 × 600 values, max-pooled" in page


# --- As a picture -----------------------------------------------------------------------------


def test_a_picture_of_everything_is_the_same_each_time() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as those about missing glyphs
        first = png(replace(EVERYTHING, parts=(*EVERYTHING.parts, Paragraph("日本 🦙 $x_{"))))
    assert first.startswith(b"\x89PNG")
    assert int.from_bytes(first[16:20], "big") <= 1500
    assert first == png(replace(EVERYTHING, parts=(*EVERYTHING.parts, Paragraph("日本 🦙 $x_{"))))


def test_a_picture_is_as_wide_as_its_drawings() -> None:
    """A wide map fills the sheet, a narrow one does not, and sentences wrap at its width."""

    def size(columns: int) -> tuple[int, int]:
        fields = Heatmap("Map", ("row",), ("c",) * columns, ((0.5,) * columns,), tokens=False)
        data = png(Page("", (fields, Paragraph("A sentence of many words. " * 12))))
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")

    (narrow, high), (wide, low) = size(3), size(60)
    assert 700 < narrow < 1000 < 1400 < wide <= 1500
    assert high > low + 50


def test_what_no_picture_can_hold() -> None:
    with pytest.raises(UsageError, match=r"pixels high.* 65,535.*\.html"):
        png(Page("", (Table(("a",), tuple((Cell("x"),) for _ in range(2500))),)))


def test_a_picture_without_matplotlib_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"not installed.*pip install \"llama-scratch\[plot\]\""):
        png(EVERYTHING)


def test_numbers_before_bars_are_aligned() -> None:
    rows = tuple((Cell(f"{value:.2f}", bar=value / 100),) for value in (2, 100, -1.5))
    text = shown(Table(("length",), rows), width=40)
    assert len({line.index(".") for line in text.splitlines() if "." in line}) == 1
