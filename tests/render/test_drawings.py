"""Icicle, dials and diagram: geometry, and the forms for terminals, plain output, pages and pictures."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from rich.cells import cell_len

from llama_scratch.render import to_terminal
from llama_scratch.render.drawings.diagram import Diagram, Part
from llama_scratch.render.drawings.dials import Dials, arrow
from llama_scratch.render.drawings.drawing import NARROW, WIDE, Box, Disc, Drawing, Label, Stroke
from llama_scratch.render.drawings.icicle import Icicle, Slice
from llama_scratch.render.page import Gallery, Page
from llama_scratch.render.to_html import html
from llama_scratch.render.to_plain import plain
from llama_scratch.render.to_png import png
from tests.helpers.pages import HOSTILE, ramp
from tests.helpers.sessions import shown

HALF = Slice("1", "␣Paris", 0.5, (Slice("1.1", ".", 0.4), Slice("1.2", ",", 0.01), Slice("1.3", "!", 0.04)))
ICICLE = Icicle("Tree", Slice("", "The", 1.0, (HALF, Slice("2", "␣the", 0.25, ends=True), Slice("3", "x", 0.02))))
DIALS = Dials("Angles", (1, 8191), ((0.0, math.pi / 2, math.pi), (math.pi / 4, 3 * math.pi / 2, 0.0)), "pair")
DIAGRAM = Diagram(
    "Network",
    "residual stream x",
    (Part("Embedding", "tok_embeddings 9×4", 0.5),),
    "2 layers",
    (((Part("RMSNorm"),), (Part("q", "wq 4×4"), Part("k", "wk 2×4")), (Part("out", "wo"),)), ((Part("w1"),),)),
    (Part("softmax"), Part("argmax")),
)
DRAWINGS: tuple[Drawing, ...] = (ICICLE, DIALS, DIAGRAM)


def text(drawing: Drawing, width: int, *, blocks: bool = True) -> str:
    return "\n".join(line.plain for line in drawing.lines(width, blocks=blocks))


# --- All drawings -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 40, 80, 160])
@pytest.mark.parametrize("drawing", DRAWINGS)
def test_a_drawing_fits_its_terminal(drawing: Drawing, width: int) -> None:
    """Without Unicode, it is ASCII except for tokens."""
    assert max(map(cell_len, text(drawing, width).splitlines())) <= width
    ascii_form = text(drawing, width, blocks=False)
    assert max(map(cell_len, ascii_form.splitlines())) <= width
    assert ascii_form.replace("␣", " ").replace("…", " ").isascii()


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("drawing", DRAWINGS)
def test_shapes_stay_inside_their_picture(drawing: Drawing, width: int) -> None:
    picture = drawing.picture(width)
    assert picture.wide == width
    for shape in picture.shapes:
        edges: tuple[float, ...]
        match shape:
            case Box():
                edges = shape.x, shape.x + shape.wide, shape.y, shape.y + shape.high
            case Disc():
                edges = shape.x - shape.radius, shape.x + shape.radius, shape.y - shape.radius, shape.y + shape.radius
            case Stroke():
                edges = *sorted((shape.x, shape.to_x)), *sorted((shape.y, shape.to_y))
            case Label():
                edges = shape.x, shape.x, shape.y, shape.y
        assert edges[0] >= 0
        assert edges[1] <= width
        assert edges[2] >= 0
        assert edges[3] <= picture.high


def test_pages_and_pictures_have_each_drawing() -> None:
    page = html(Page("Drawings", DRAWINGS))
    assert page.count("<svg") == 2 * len(DRAWINGS)
    assert 'data-hover="2 ␣the: 25.0 % for the whole path, where the text ends"' in page
    assert not re.search(r"(?:src|href)=\"(?!#)|https?:|url\(", page)
    assert png(Page("Drawings", DRAWINGS)).startswith(b"\x89PNG")


def test_a_label_cannot_inject_markup() -> None:
    page = html(Page("", (Icicle(HOSTILE, Slice("", HOSTILE, 1.0, (Slice("1", HOSTILE, 0.9),))),)))
    assert page.count("<script") == 2
    assert "\x1b" not in page
    assert "\u202e" not in page


# --- Icicle -----------------------------------------------------------------------------------


def test_a_branch_is_as_wide_as_it_is_probable() -> None:
    rows = ICICLE.rows(200, 6)
    places = [[(span.branch.name if span.branch else span.merged, span.left, span.right) for span in r] for r in rows]
    assert places == [
        [("", 0, 200)],
        [("1", 0, 100), ("2", 100, 150), (1, 150, 154)],
        [("1.1", 0, 80), ("1.3", 80, 88), (1, 88, 90)],
    ]


def test_small_branches_are_merged() -> None:
    many = tuple(Slice(f"{n}", "x", 0.01) for n in range(2, 23))
    rows = Icicle("", Slice("", "The", 1.0, (Slice("1", "a", 0.5), *many))).rows(100, 6)
    assert [(span.left, span.right, span.merged) for span in rows[1]] == [(0, 50, 0), (50, 71, 21)]
    assert rows[1][1].share == pytest.approx(0.21)
    assert list(rows[1][1].names()) == ["21 others", "+21"]
    assert "21 others" in text(Icicle("", Slice("", "The", 1.0, (Slice("1", "a", 0.5), *many))), 80)


def test_children_stay_within_their_parent() -> None:
    """Even if rounding, or the numbers themselves, add up to more."""
    child = Slice("1.1", "a", 0.45)
    rows = Icicle("", Slice("", "The", 1.0, (Slice("1", "b", 0.5, (child, child)),))).rows(100, 6)
    assert [(span.left, span.right) for span in rows[2]] == [(0, 45), (45, 50)]


def test_the_edges_of_the_icicle_meet() -> None:
    assert text(replace(ICICLE, root=replace(ICICLE.root, children=(HALF,))), 33).splitlines() == [
        "┌───────────────────────────────┐",
        "│The                            │",
        "├───────────────┬───────────────┘",
        "│1 ␣Paris       │",
        "│50.0 %         │",
        "├────────────┬─┬┘",
        "│1.1 .       │ │",
        "│40.0 %      │ │",
        "└────────────┴─┘",
    ]


# --- Dials ------------------------------------------------------------------------------------


def test_hands_point_in_the_direction_of_their_angle() -> None:
    """From the right, counterclockwise; y grows downwards."""
    hands = [shape for shape in DIALS.picture(WIDE).shapes if isinstance(shape, Stroke)]
    angles = [math.atan2(hand.y - hand.to_y, hand.to_x - hand.x) % math.tau for hand in hands]
    assert angles == pytest.approx([angle for row in DIALS.angles for angle in row])


def test_dials_on_a_terminal_have_an_arrow_and_degrees() -> None:
    assert text(DIALS, 80).splitlines() == [
        "pair   0    1    2",
        "1      →0   ↑90  ←180",
        "8,191  ↗45  ↓270 →0",
    ]
    assert text(DIALS, 20).count("pair") == 2
    assert [arrow(math.radians(45 * n), blocks=False) for n in range(8)] == list(">/^\\</v\\")


def test_dials_in_plain_output() -> None:
    lines = plain(Page("", (DIALS,))).plain.splitlines()
    assert lines == [
        "Angles:",
        "Position 1, angle of each pair: 0 0°, 1 90°, 2 180°",
        "Position 8,191, angle of each pair: 0 45°, 1 270°, 2 0°",
    ]


# --- Diagram ----------------------------------------------------------------------------------


def test_the_stream_is_a_straight_line_to_which_each_branch_is_added() -> None:
    shapes = DIAGRAM.picture(WIDE).shapes
    line = max((shape for shape in shapes if isinstance(shape, Stroke)), key=lambda shape: shape.thickness)
    sums = [shape for shape in shapes if isinstance(shape, Disc)]
    assert line.x == line.to_x
    assert [disc.x for disc in sums] == [line.x] * len(DIAGRAM.branches)
    assert all(line.y < disc.y < line.to_y for disc in sums)
    assert sum(isinstance(shape, Box) for shape in shapes) == 8 + 1  # parts, and the frame of the layers


def test_the_stream_on_a_terminal() -> None:
    lines = text(DIAGRAM, 40).splitlines()
    inside = lines[3 : next(n for n, line in enumerate(lines) if "softmax" in line) - 1]
    assert {line[1] for line in inside} == {"┃", "┣", "⊕"}
    assert sum("⊕" in line for line in lines) == len(DIAGRAM.branches)
    assert "residual stream x" in lines[4]
    assert "2 layers" in lines[5]
    assert plain(Page("", (DIAGRAM,))).plain.splitlines()[1:3] == [
        "Embedding: tok_embeddings 9×4",
        "residual stream x; then 2 layers, each:",
    ]


# --- Galleries --------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "columns"), [(160, 9), (110, 9), (80, 9), (40, 3)])
def test_a_gallery_has_a_column_per_head_if_there_is_room(width: int, columns: int) -> None:
    gallery = Gallery("Heads", tuple(ramp(4, 4, title=f"L0.H{n}") for n in range(18)), columns=9)
    lines = [line for line in shown(to_terminal.view(Page("", (gallery,))), width).splitlines() if "L0.H" in line]
    assert lines[0].count("L0.H") == columns
    assert max(map(len, lines)) <= width
    assert "--columns: 9" in html(Page("", (gallery,)))
