"""Render pages as PNG pictures with matplotlib, on a sheet of fixed width."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence

from llama_scratch.errors import UsageError
from llama_scratch.render import colors
from llama_scratch.render.drawings.drawing import WIDE, Drawing
from llama_scratch.render.letters import LETTER, cut, drawable, line_height, text_width, wrapped
from llama_scratch.render.page import (
    Cell,
    Code,
    Finding,
    Gallery,
    Heatmap,
    Page,
    PageBlock,
    Paragraph,
    Running,
    Table,
    written,
)
from llama_scratch.render.painting import paint
from llama_scratch.render.palette import LIGHT_PALETTE
from llama_scratch.render.pooling import pooled, pooling
from llama_scratch.render.sheet import INK, PAPER, SOFT, WIDTH, Sheet, scale_of, shade_of
from llama_scratch.render.surprise import NAMES

# Lengths are in inches, font sizes in points (1/72 inch).
_MARGIN, _DPI = 0.55, 150
_ROOM = WIDTH - 2 * _MARGIN
_NARROWEST = 5.0  # minimum width of sentences
_TEXT = (Finding, Paragraph)
_COARSE = 30  # pixels per inch, enough to measure the width of a drawing
_GAP = 0.3
_CLOSER = 0.16  # reduces the gap after a title
_TITLE, _HEADING, _FINDING, _BODY, _SMALL, _TINY = 20.0, 14.0, 12.5, 10.5, 9.0, 7.5
# The height limit of matplotlib's Agg backend, in pixels.
_LONGEST = 1 << 16
# Maximum (rows, columns) of a map with texts, without texts, and in a gallery.
_TEXTS, _DRAWN, _TILE = (128, 256), (256, 256), (48, 48)
_FIELD, _FIELD_WITH_TEXT = 0.27, (0.57, 0.68)  # minimum and maximum width of a field with text
_TILES, _MOST_TILES = 6, 16  # maps per row, by default and at most
_SOFT, _LINE, _MARK = SOFT, LIGHT_PALETTE["line"], LIGHT_PALETTE["mark"]
_NAMED = {"dim": _SOFT} | {name: LIGHT_PALETTE[name] for name in ("red", "green", "yellow", "blue", "magenta", "cyan")}


def png(page: Page) -> bytes:
    """Render a page as a PNG file, trimmed to its content, at most 1,500 pixels wide.

    Raises:
        UsageError: If matplotlib is not installed, or if the picture would be too high.
    """
    try:
        return _png(page)
    except ImportError as error:
        raise UsageError(
            "Pictures need matplotlib, which is not installed. "
            'Run pip install "llama-scratch[plot]", or choose a file name that ends in .html.'
        ) from error


def _png(page: Page) -> bytes:
    from matplotlib.transforms import Bbox

    # Text is only as wide as the drawings, to avoid an empty right half.
    drawings = [block for part in page.parts if not isinstance(part, _TEXT) for block in _part(part, _ROOM)]
    room = max(_NARROWEST, _drawn(drawings, _COARSE).right_edge() - _MARGIN) if drawings else _ROOM
    title = _text(page.headline, _TITLE, bold=True, room=room)
    sheet = _drawn([title, *(block for part in page.parts for block in _part(part, room))], _DPI)
    data = io.BytesIO()
    trimmed = Bbox.from_bounds(0, 0, min(WIDTH, room + 2 * _MARGIN), sheet.height)
    sheet.figure.savefig(
        data, format="png", dpi=_DPI, facecolor=PAPER, bbox_inches=trimmed, metadata={"Software": "llama-scratch"}
    )
    return data.getvalue()


def _drawn(blocks: Sequence[_Block], dpi: int) -> Sheet:
    """Draw blocks one below the other on a new sheet.

    Args:
        blocks: The blocks.
        dpi: Pixels per inch.
    """
    from matplotlib.figure import Figure

    height = 2 * _MARGIN + sum(high for high, _ in blocks) + _GAP * (len(blocks) - 1)
    if height * _DPI >= _LONGEST:
        raise UsageError(
            f"The picture would be {height * _DPI:,.0f} pixels high; the limit is {_LONGEST - 1:,}. "
            "Choose a file name that ends in .html."
        )
    sheet = Sheet(Figure((WIDTH, height), dpi=dpi, facecolor=PAPER), height)
    top = _MARGIN
    for high, draw in blocks:
        draw(sheet, top)
        top += high + _GAP
    return sheet


_Block = tuple[float, Callable[[Sheet, float], None]]  # height, function that draws it at a given top edge


def _color(style: str) -> str:
    if background := _background(style):
        return colors.ink(background)
    return next((_NAMED[word] for word in reversed(style.split()) if word in _NAMED), INK)


def _background(style: str) -> str:
    """The background of a style by surprisal; "" for other styles."""
    return dict(zip(NAMES, colors.SURPRISE["light"], strict=True)).get(style, "")


# --- Blocks -----------------------------------------------------------------------------------


def _part(part: PageBlock, room: float) -> Iterable[_Block]:
    """Lay out a part of a page. `room` is the width of running sentences."""
    match part:
        case Finding():
            return [_text(written(part.text), _FINDING, room=room)]
        case Paragraph():
            bold = "bold" in part.style
            heading = bold and len(part.text) < 100
            size = _HEADING if heading else _SMALL if "dim" in part.style else _BODY
            return [_text(written(part.text), size, bold=bold, color=_color(part.style), room=room)]
        case Running():
            return [_running(part)]
        case Table():
            return [*_title(part.title), _table(part)]
        case Heatmap():
            return _heatmap(part)
        case Gallery():
            return [*_title(part.title), *_gallery(part)]
        case Code():
            return [_code(part)]
        case Drawing():
            return [*_title(part.title), _drawing(part)]


def _title(title: str) -> list[_Block]:
    if not title:
        return []
    high, draw = _text(written(title), _BODY, bold=True)
    return [(high - _CLOSER, draw)]


def _text(text: str, size: float, *, bold: bool = False, color: str = INK, room: float = _ROOM) -> _Block:
    lines = list(wrapped(text, room, size, bold))

    def draw(sheet: Sheet, top: float) -> None:
        for n, line in enumerate(lines):
            sheet.write(_MARGIN, top + (n + 0.5) * line_height(size), line, size, bold=bold, color=color)

    return len(lines) * line_height(size), draw


def _running(part: Running) -> _Block:
    """Lay out running text in a monospaced font, with line breaks at the full width."""
    letter = LETTER * _BODY
    line_length = int(_ROOM / letter)
    lines: list[list[tuple[int, str, Cell]]] = [[]]
    column = 0
    for cell in part.pieces:
        text = drawable(written(cell.text, token=cell.token), True, "bold" in cell.style)
        # Tokens and words stay whole if they fit on a line. A line break within a token also breaks the line.
        words = [text, *(["\n"] if "\n" in cell.text else [])] if cell.token else re.findall(r"\n|[^\S\n]*\S*", text)
        for word in words:
            if word == "\n" or (column and column + len(word) > line_length and len(word) <= line_length):
                lines.append([])
                column = 0
            while word.strip("\n"):
                if column == line_length:
                    lines.append([])
                    column = 0
                lines[-1].append((column, word[: line_length - column], cell))
                column, word = min(line_length, column + len(word)), word[line_length - column :]

    def draw(sheet: Sheet, top: float) -> None:
        for n, line in enumerate(lines):
            for place, text, cell in line:
                x, y = _MARGIN + place * letter, top + (n + 0.5) * line_height(_BODY)
                if background := _background(cell.style):
                    sheet.fill(x, y - 0.11, len(text) * letter, 0.22, background)
                sheet.write(x, y, text, _BODY, mono=True, bold="bold" in cell.style, color=_color(cell.style))

    return len(lines) * line_height(_BODY), draw


def _table(part: Table) -> _Block:
    """Lay out a table: columns fit their texts, and bars share the remaining width."""
    names = [written(name.removeprefix(">")) for name in part.columns]
    barred = [any(row[i].bar is not None for row in part.rows) for i in range(len(names))]
    both = [any((row[i].bar or 0) < 0 for row in part.rows) for i in range(len(names))]

    def shown(cell: Cell) -> tuple[str, bool, bool]:
        return written(cell.text, token=cell.token).replace("\n", " "), cell.token, "bold" in cell.style

    def needs(i: int) -> float:
        texts = [text_width(text, _SMALL, mono, bold) for text, mono, bold in (shown(row[i]) for row in part.rows)]
        return max([text_width(names[i], _SMALL), *texts], default=0.0)

    gap, least = 0.25, 1.5
    widths = list(map(needs, range(len(names))))
    room = _ROOM - gap * (len(names) - 1) - least * sum(barred)
    while sum(widths) > room + 1e-6:  # shrink the widest columns, at most to the width of the next one
        widest = max(widths)
        others = sorted({width for width in widths if width < widest - 1e-6}) or [0.0]
        count = sum(width >= widest - 1e-6 for width in widths)
        to = max(others[-1], widest - (sum(widths) - room) / count)
        widths = [min(width, to) for width in widths]
    share = (room - sum(widths)) / max(1, sum(barred)) + least
    bar = min(share, 4.5)
    high = line_height(_SMALL) * 1.15

    def draw(sheet: Sheet, top: float) -> None:
        x = _MARGIN
        for i, name in enumerate(names):
            number = part.columns[i].startswith(">")
            edge = x + widths[i] if number else x
            sheet.write(edge, top + high / 2, name, _SMALL, color=_SOFT, right=number)
            for n, row in enumerate(part.rows, start=1):
                text, mono, bold = shown(row[i])
                y, color = top + n * high, _color(row[i].style)
                text = cut(text, widths[i] + 0.01, _SMALL, mono, bold)
                if background := _background(row[i].style):
                    sheet.fill(x, y + 0.02, text_width(text, _SMALL, mono, bold), high - 0.04, background)
                sheet.write(edge, y + high / 2, text, _SMALL, mono=mono, bold=bold, right=number, color=color)
                value = row[i].bar
                if value is not None:
                    sheet.bar(x + widths[i] + 0.1, y, (bar - 0.1, high), max(-1.0, min(1.0, value)), both=both[i])
            x += widths[i] + gap + (bar if barred[i] else 0)
        wide = x - gap - _MARGIN
        for n in range(len(part.rows)):
            sheet.fill(_MARGIN, top + (n + 1) * high, wide, 0.008, _LINE)

    return (len(part.rows) + 1) * high, draw


# --- Heat maps --------------------------------------------------------------------------------


def _heatmap(whole: Heatmap) -> list[_Block]:
    """Lay out a heat map. If a map with texts is too wide, it continues below."""
    texts = whole.texts is not None
    shown = pooled(whole, *(_TEXTS if texts else _DRAWN))
    labels = [cut(shown.row(r), 1.6, _TINY, shown.row_tokens) for r in range(len(shown.rows))]
    left = max((text_width(label, _TINY, shown.row_tokens) for label in labels), default=0.0) + 0.1
    beside = max((text_width(text, _TINY) for text in shown.margin.texts), default=-0.1) + 0.1 if shown.margin else 0.0
    if texts:
        min_width, max_width = (0.1, _FIELD) if whole.scale.kinds else _FIELD_WITH_TEXT
        total = len(shown.columns)
        count = max(1, -int(-total * min_width // (_ROOM - left - beside)))  # pieces of nearly equal width
        pieces = [range(i * total // count, (i + 1) * total // count) for i in range(count)]
        size = min(max_width, (_ROOM - left - beside) / max(1, *map(len, pieces))), 0.22
    else:
        pieces = [range(len(shown.columns))]
        side = min(_FIELD, (_ROOM - left - beside) / max(1, len(shown.columns)))
        size = side, side
    maps = [_fields(shown, labels, left, columns, size) for columns in pieces]
    return [*_title(whole.title), *maps, _legend(whole, shown)]


def _fields(shown: Heatmap, labels: Sequence[str], left: float, columns: range, size: tuple[float, float]) -> _Block:
    """Lay out some columns of a heat map with their labels."""
    wide, high = size
    texts = shown.texts is not None
    max_width = wide - 0.06 if texts else 1.1
    heads = [cut(shown.column(c), max_width, _TINY, shown.tokens) for c in columns]
    head = 0.2 if texts else max((text_width(text, _TINY, shown.tokens) for text in heads), default=0.0) + 0.08
    beside = shown.margin.texts if shown.margin else ()
    beside_width = max((text_width(text, _TINY) for text in beside), default=0.0)
    # If fields are smaller than the labels, only some labels are drawn.
    across, down = (max(1, -(-0.14 // step)) for step in size)

    def draw(sheet: Sheet, top: float) -> None:
        x = _MARGIN + left
        sheet.shades(x, top + head, size, shown, columns)
        for n, text in enumerate(heads):
            if texts:
                sheet.write(x + n * wide + 0.03, top + head / 2, text, _TINY, mono=shown.tokens)
            elif n % across == 0:
                sheet.write(x + (n + 0.5) * wide, top + head - 0.05, text, _TINY, mono=shown.tokens, upright=True)
        for r, label in enumerate(labels):
            y = top + head + (r + 0.5) * high
            if r % down == 0:
                sheet.write(x - 0.06, y, label, _TINY, mono=shown.row_tokens, right=True, color=_SOFT)
            for n, c in enumerate(columns if texts else ()):
                shade, marked = shown.shade(r, c), shown.mark(r, c)
                color = colors.ink_on(shade[0] if shade and not marked else "", shade_of(shown, r, c) or PAPER, "light")
                text = cut(shown.text(r, c), max_width, _TINY, mono=True)
                sheet.write(x + n * wide + 0.03, y, text, _TINY, mono=True, bold=marked, color=color)
            if beside and columns[-1] == len(shown.columns) - 1:
                end = x + len(columns) * wide + 0.1 + beside_width
                sheet.write(end, y, beside[r], _TINY, right=True, color=_SOFT)

    return head + high * len(labels), draw


def _legend(whole: Heatmap, shown: Heatmap) -> _Block:
    """The legend of a map: the scale between its ends, or the kinds of fields."""
    if whole.scale.kinds:
        return _kinds(whole)
    (low, high), labels = whole.scale.ends(whole.values), whole.scale.labels(whole.values)
    scale = [*reversed(scale_of("m"))] if low < 0 else []
    if high > 0 or low >= 0:
        scale += scale_of("p" if whole.scale.signed else "v")
    begin = f"{written(whole.scale.legend)}: {labels[0]}" if whole.scale.legend else labels[0]
    notes = (labels[1], f"right: {written(whole.margin.title)}" if whole.margin else "", pooling(whole, shown))

    def draw(sheet: Sheet, top: float) -> None:
        y, x = top + 0.08, _MARGIN + text_width(begin, _TINY) + 0.08
        sheet.write(_MARGIN, y, begin, _TINY, color=_SOFT)
        for n, color in enumerate(scale):
            sheet.fill(x + 0.04 * n, top + 0.02, 0.042, 0.12, color)
        sheet.write(x + 0.04 * len(scale) + 0.08, y, "   ".join(filter(None, notes)), _TINY, color=_SOFT)

    return 0.16, draw


def _kinds(heatmap: Heatmap) -> _Block:
    """The letter and the name of each kind."""

    def draw(sheet: Sheet, top: float) -> None:
        x, y = _MARGIN, top + 0.1
        for kind in heatmap.scale.kinds:
            color = scale_of(kind.hue)[-1]
            sheet.fill(x, top, 0.22, 0.2, color)
            sheet.write(x + 0.07, y, kind.letter, _TINY, mono=True, color=colors.ink_on(kind.hue, color, "light"))
            sheet.write(x + 0.3, y, kind.name, _TINY, color=_SOFT)
            x += 0.5 + text_width(kind.name, _TINY)
        if heatmap.scale.legend:
            sheet.write(x, y, f"strength: {heatmap.scale.legend}", _TINY, color=_SOFT)

    return 0.2, draw


def _gallery(part: Gallery) -> list[_Block]:
    across = part.columns if 0 < part.columns <= _MOST_TILES else _TILES
    gap = min(0.2, 1.2 / across)
    tile = (_ROOM - gap * (across - 1)) / across
    maps = [pooled(heatmap, *_TILE) for heatmap in part.maps]
    rows = [maps[i : i + across] for i in range(0, len(maps), across)]
    return [*(_tiles(row, tile, gap) for row in rows), *([_legend(part.maps[0], part.maps[0])] if part.maps else [])]


def _tiles(maps: Sequence[Heatmap], tile: float, gap: float) -> _Block:
    sides = [min(_FIELD, tile / max(1, len(heatmap.rows), len(heatmap.columns))) for heatmap in maps]

    def draw(sheet: Sheet, top: float) -> None:
        for n, (heatmap, side) in enumerate(zip(maps, sides, strict=True)):
            x = _MARGIN + n * (tile + gap)
            sheet.write(x, top + 0.08, cut(written(heatmap.title), tile, _TINY), _TINY, color=_SOFT)
            sheet.shades(x, top + 0.2, (side, side), heatmap, range(len(heatmap.columns)))

    return 0.2 + max(side * len(heatmap.rows) for heatmap, side in zip(maps, sides, strict=True)), draw


def _drawing(part: Drawing) -> _Block:
    picture, inch = part.picture(WIDE), _ROOM / WIDE

    def draw(sheet: Sheet, top: float) -> None:
        paint(sheet, picture, _MARGIN, top, inch)

    return picture.high * inch, draw


# --- Source -----------------------------------------------------------------------------------


def _code(part: Code) -> _Block:
    lines = [written(line) for line in part.text.splitlines()]
    size, letter = 8.0, LETTER * 8
    high = 1.45 * size / 72

    def draw(sheet: Sheet, top: float) -> None:
        sheet.write(_MARGIN, top + 0.1, written(part.location), _SMALL, mono=True, color=_SOFT)
        for n, line in enumerate(lines):
            y = top + 0.25 + n * high
            if n + 1 in part.marked:
                sheet.fill(_MARGIN, y, _ROOM, high, _MARK)
            sheet.write(
                _MARGIN + 5 * letter, y + high / 2, str(part.first + n), size, mono=True, right=True, color=_SOFT
            )
            text = cut(line, _ROOM - 7 * letter, size, mono=True)
            sheet.write(_MARGIN + 7 * letter, y + high / 2, text, size, mono=True)

    return 0.25 + len(lines) * high, draw
