"""Heat maps on a terminal: 24-bit color, marks, folds and legends."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment

from llama_scratch.render import colors, to_plain, to_terminal
from llama_scratch.render.page import Fold, Gallery, Heatmap, Margin, Page, PageBlock, Window
from llama_scratch.render.scale import Kind, Scale
from llama_scratch.render.to_html import html
from llama_scratch.render.to_png import png
from tests.helpers.pages import ramp, with_texts


def segments(part: PageBlock, width: int = 80, **how: Any) -> list[list[Segment]]:
    """The segments of each line on a terminal with 24-bit color."""
    settings: dict[str, Any] = {"color_system": "truecolor", "force_terminal": True, "_environ": {}} | how
    console = Console(file=io.StringIO(), width=width, **settings)
    return console.render_lines(to_terminal.view(Page("", (part,))), pad=False)


def lines(part: PageBlock, width: int = 80, **how: Any) -> list[str]:
    """The text of each line."""
    return ["".join(segment.text for segment in line).rstrip() for line in segments(part, width, **how)]


def backgrounds(line: list[Segment]) -> set[str]:
    """The background colors in a line."""
    styles = [segment.style for segment in line if segment.style and segment.style.bgcolor]
    return {style.bgcolor.name for style in styles if style.bgcolor}


def lens(rows: int = 14, columns: int = 5) -> Heatmap:
    """A map like a logit lens, whose last column has a long text in each row and the answer in the first row."""
    texts = tuple((*(f" t{c}" for c in range(columns - 1)), " a_long_answer") for _ in range(rows))
    grid = tuple(tuple(r == 0 and c == columns - 1 for c in range(columns)) for r in range(rows))
    return replace(
        ramp(rows, columns),
        texts=texts,
        marked=grid,
        fold=Fold(tuple(tuple(2 <= r < rows - 2 for _ in range(columns)) for r in range(rows)), "nothing new"),
        margin=Margin("rank of x", tuple(f"{10**r % 99999}" for r in range(rows))),
        scale=Scale(legend="probability of the top prediction", percent=True),
    )


KINDS = Heatmap(
    "Kinds", ("H0", "H1"), tuple(map(str, range(30))), (30 * (0.9,), 30 * (0.2,)), tokens=False,
    texts=(15 * ("P", "F"), 30 * ("·",)), window=Window(0),
    scale=Scale(legend="score", kinds=(Kind("P", "previous token", "blue"), Kind("F", "first token", "gray"))),
)  # fmt: skip


def test_the_background_is_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    heatmap = ramp(1, 2, values=((0.0, 1.0),))
    for variable, scale in (("15;0", colors.DARK["v"]), ("0;15", colors.LIGHT["v"])):
        monkeypatch.setenv("COLORFGBG", variable)
        (row,) = (line for line in segments(heatmap) if "r0" in "".join(segment.text for segment in line))
        assert backgrounds(row) == {scale[0], scale[-1]}


@pytest.mark.parametrize("how", [{"color_system": "256"}, {"color_system": "standard"}, {"no_color": True}])
def test_other_terminals_have_characters(how: dict[str, Any]) -> None:
    heatmap = ramp(1, 2, values=((0.2, 1.0),))
    assert not set().union(*map(backgrounds, segments(heatmap, **how)))
    assert " r0 ░░██" in lines(heatmap, **how)
    assert "▸␣a_long_answer" in "\n".join(lines(lens(), **how))


@pytest.mark.parametrize("width", [40, 80, 160])
@pytest.mark.parametrize("how", [{}, {"color_system": None}])
def test_the_marked_column_is_complete_at_any_width(width: int, how: dict[str, Any]) -> None:
    drawn = lines(lens(columns=9), width, **how)
    assert sum("␣a_long_answer" in line for line in drawn) == 4  # the rows that are not folded
    assert max(map(cell_len, drawn)) <= width


def test_the_marked_field_has_a_color_of_its_own() -> None:
    marked = [line for line in segments(lens()) if colors.MARK["dark"] in backgrounds(line)]
    assert len(marked) == 1
    assert "␣a_long_answer" in "".join(segment.text for segment in marked[0])


def test_quiet_rows_are_one_line() -> None:
    drawn = lines(lens())
    assert any(line.endswith("r2 to r11: nothing new") for line in drawn)
    assert not any(line.startswith(" r5") for line in drawn)
    few = lines(replace(lens(), fold=Fold(tuple(5 * (2 <= r < 4,) for r in range(14)), "nothing new")))
    assert any(line.startswith(" r3") for line in few)  # two rows are not folded
    assert not any("nothing new" in line for line in few)


def test_a_high_map_has_its_tokens_at_the_foot_too() -> None:
    assert sum("␣c0" in line for line in lines(replace(lens(), fold=None))) == 2
    assert sum("␣c0" in line for line in lines(with_texts(5))) == 1


def test_texts_beside_the_map() -> None:
    drawn = lines(lens())
    (row,) = (line for line in drawn if line.startswith(" r1 "))
    assert row.endswith(" 10")
    assert "Right: rank of x." in " ".join(drawn)
    assert "rank of x: r0: 1; r1: 10;" in to_plain.plain(Page("", (lens(),))).plain


def test_a_legend_names_the_values_and_has_the_used_half_only() -> None:
    text = "\n".join(lines(lens(), color_system=None))
    assert "probability of the top prediction: 0 ·░▒▓█ 100 %" in text
    signed = ramp(1, 2, scale=Scale(-2.0, 2.0))
    for values, ends in (((0.5, 1.0), (0, 2)), ((-0.5, -1.0), (-2, 0)), ((-1.0, 1.0), (-2, 2))):
        heatmap = replace(signed, values=(values,))
        assert heatmap.scale.ends(heatmap.values) == ends
        legend = lines(heatmap, color_system=None)[-2]
        assert ("≣" in legend, "█" in legend) == (ends[0] < 0, ends[1] > 0)


def test_a_tooltip_is_a_sentence() -> None:
    heatmap = ramp(1, 2, values=((0.5, None),), says="{row} attends to {column}: {value}.", scale=Scale(percent=True))
    assert heatmap.hover(0, 0) == "r0 attends to ␣c0: 50.0 %."
    assert heatmap.hover(0, 1) == ""
    tricky = replace(heatmap, rows=("{column}",))
    assert tricky.hover(0, 0) == "{column} attends to ␣c0: 50.0 %."


def test_a_map_of_kinds_has_a_letter_and_a_hue_in_each_field() -> None:
    drawn = segments(KINDS)
    (row,) = (line for line in drawn if line and "H0" in "".join(segment.text for segment in line))
    hues = {colors.steps(colors.DARK[hue])[colors.step(0.9)] for hue in ("blue", "gray")}
    assert backgrounds(row) == hues
    for width, letters in ((80, "P F P F"), (40, "PFPF")):
        text = "\n".join(lines(KINDS, width))
        assert letters in text
        assert " P  previous token" in text
        assert "strength: score" in text
    assert "P█F█" in "\n".join(lines(KINDS, color_system=None))


@pytest.mark.parametrize("theme", [colors.LIGHT, colors.DARK])
def test_letters_are_legible_on_every_step(theme: dict[str, tuple[str, ...]]) -> None:
    name = "light" if theme is colors.LIGHT else "dark"
    for hue, stops in theme.items():
        for color in colors.steps(stops):
            ink = colors.ink_on(hue, color, name)
            high, low = sorted(map(colors.luminance, (color, ink)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3


def test_pages_and_pictures_have_marks_kinds_and_texts_beside() -> None:
    page = html(Page("", (lens(), KINDS, replace(lens(), texts=None))))
    assert page.count('class="answer"') == 1
    assert '<th class="beside">rank of x</th>' in page
    assert 'class="blue22"' in page
    assert "</b>&nbsp;previous token" in page
    assert '"marked": [[false, false, false, false, true]' in page
    assert "probability of the top prediction: 0" in page
    gallery = Gallery("All", 9 * (ramp(3, 3),), 9)
    assert "--columns: 9" in html(Page("", (gallery,)))
    assert png(Page("", (lens(), KINDS, replace(lens(), texts=None), gallery))).startswith(b"\x89PNG")
