"""An icicle plot of a tree: the width of each branch shows its probability."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from llama_scratch.render.drawings.drawing import Box, Drawing, Label, Picture, Shape, cut, letters, step
from llama_scratch.render.text import percent

# Minimum width of a branch that is drawn on its own: columns of a terminal, pixels of a picture.
_LEAST_COLUMNS, _LEAST_PIXELS = 6, 44
_HIGH = 46
# Box-drawing characters by the edges that meet: up, down, left, right.
_JOINTS = {
    "0101": "┌", "0110": "┐", "1001": "└", "1010": "┘", "1101": "├", "1110": "┤", "0111": "┬", "1011": "┴",
    "1111": "┼", "0011": "─", "1100": "│", "0010": "─", "0001": "─", "0000": " ",
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """A branch of the tree.

    Attributes:
        name: The path that selects it, such as "1.2".
        label: Its token, escaped for display.
        share: Probability of the whole path. The width of the branch is proportional to it.
        children: The branches below it.
        ends: Whether the text ends with this token.
    """

    name: str
    label: str
    share: float
    children: tuple[Slice, ...] = ()
    ends: bool = False


@dataclass(frozen=True)
class Span:
    """A span of a row of the icicle: a branch, or merged small branches of one parent.

    Attributes:
        left: Left edge.
        right: Right edge.
        share: Probability of the branch, or of all merged ones.
        branch: The branch. None: merged branches.
        merged: Number of merged branches.
    """

    left: int
    right: int
    share: float
    branch: Slice | None
    merged: int = 0

    def names(self) -> Iterator[str]:
        """Yield labels, the longest first."""
        if self.branch is None:
            yield f"{self.merged} other{'' if self.merged == 1 else 's'}"
            yield f"+{self.merged}"
        elif self.branch.name:
            yield f"{self.branch.name} {self.branch.label}"
        else:
            yield self.branch.label

    def name(self, room: int) -> str:
        """The longest label of at most `room` characters.

        If no label fits, the label of a branch is cut. Merged branches then have no label.
        """
        names = list(self.names())
        return next((name for name in names if cell_len(name) <= room), cut(names[0], room) if self.branch else "")

    def hover(self) -> str:
        """The tooltip."""
        name = next(self.names())
        end = ", where the text ends" if self.branch and self.branch.ends else ""
        return f"{name}: {percent(self.share)} for the whole path{end}"


@dataclass(frozen=True)
class Icicle(Drawing):
    """A tree in which the width of each branch is proportional to its probability.

    Attributes:
        root: The text before the branches, with probability 1.
    """

    root: Slice

    def rows(self, width: int, least: int) -> list[list[Span]]:
        """Return the branches of each level, from the root on, left to right.

        Branches narrower than `least` are merged, and their descendants are left out. The part of a parent that no
        branch covers stays empty.

        Args:
            width: Width of the root.
            least: Minimum width of a branch.
        """
        rows = [[Span(0, width, self.root.share, self.root)]]
        while below := [span for above in rows[-1] for span in _below(above, width, least)]:
            rows.append(below)
        return rows

    def picture(self, width: int) -> Picture:
        """Return the shapes: a box per branch, darker if it is more probable."""
        shapes: list[Shape] = []
        rows = self.rows(width, _LEAST_PIXELS)
        for level, row in enumerate(rows):
            for span in row:
                fill = step(0.75 * span.share) if level and span.branch else "panel"
                ink = f"on-{fill}" if fill != "panel" else "ink"
                wide, y = span.right - span.left, level * _HIGH
                shapes.append(Box(span.left, y, wide, _HIGH, fill, "paper", span.hover() if level else ""))
                named = span.name(letters(wide - 12, 13))
                if not level:
                    shapes.append(Label(6, y + _HIGH / 2, named, 13, ink, mono=True))
                    continue
                shapes.append(Label(span.left + 6, y + 15, named, 13, ink, mono=True, bold=bool(span.branch)))
                if len(share := percent(span.share)) <= letters(wide - 8, 12):
                    shapes.append(Label(span.left + 6, y + 33, share, 12, ink))
        return Picture(width, len(rows) * _HIGH, tuple(shapes))

    def lines(self, width: int, *, blocks: bool) -> Iterator[Text]:
        """Yield a rule, the names and the probabilities of each level.

        Args:
            width: Number of columns.
            blocks: Whether the terminal has Unicode characters.
        """
        above: Sequence[Span] = ()
        for level, row in enumerate(self.rows(width - 1, _LEAST_COLUMNS)):
            yield _rule(above, row, width, blocks)
            yield _columns(row, [span.name(span.right - span.left - 1) for span in row], "bold", blocks)
            if level:
                shares = [percent(span.share) for span in row]
                fitting = [share if len(share) < s.right - s.left else "" for share, s in zip(shares, row, strict=True)]
                yield _columns(row, fitting, "", blocks)
            above = row
        yield _rule(above, (), width, blocks)

    def spoken(self) -> Iterator[str]:
        """Yield nothing: a table below the drawing lists all branches."""
        return iter(())


def _below(span: Span, width: int, least: int) -> Iterator[Span]:
    """Yield the children of a branch within its edges."""
    if span.branch is None:
        return
    left, small = span.left, []
    for child in span.branch.children:
        right = min(span.right, left + round(child.share * width))
        if right - left < least:
            small.append(child)
        else:
            yield Span(left, right, child.share, child)
            left = right
    share = sum(child.share for child in small)
    right = min(span.right, left + round(share * width))
    if small and right - left > 1:
        yield Span(left, right, share, None, len(small))


def _edges(row: Sequence[Span]) -> set[int]:
    return {x for span in row for x in (span.left, span.right)}


def _rule(above: Sequence[Span], below: Sequence[Span], width: int, blocks: bool) -> Text:
    """Draw the line between two levels."""
    over, under = _edges(above), _edges(below)
    covered = {x for row in (above, below) for span in row for x in range(span.left, span.right)}
    rule = ""
    for x in range(width):
        joint = "".join(str(int(met)) for met in (x in over, x in under, x - 1 in covered, x in covered))
        char = _JOINTS[joint]
        rule += char if blocks or char in " " else "-" if char == "─" else "+"
    return Text(rule.rstrip(), style="dim", no_wrap=True, overflow="crop")


def _columns(row: Sequence[Span], texts: Sequence[str], style: str, blocks: bool) -> Text:
    """Draw the texts of a level between vertical lines."""
    line, edge = Text(no_wrap=True, overflow="crop"), "│" if blocks else "|"
    for n, (span, text) in enumerate(zip(row, texts, strict=True)):
        line.append(" " * (span.left - line.cell_len))
        if line.cell_len == span.left:
            line.append(edge, "dim")
        line.append(text, style if span.branch else "dim")
        line.append(" " * (span.right - line.cell_len))
        if n == len(row) - 1 or row[n + 1].left != span.right:
            line.append(edge, "dim")
    return line
