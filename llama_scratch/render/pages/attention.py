"""What attention heads look at, and what kind of head each one looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Gallery, Heatmap, Page, PageBlock, Paragraph, Table
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.attention import Head, Heads, Scores, SmallMap

_SOURCE = ("head_scores", "softmax")
# The letter that stands for each kind of head, and where its attention goes.
_KINDS = {
    "previous token": ("P", "the token before"),
    "first token": ("F", "the first token"),
    "duplicate token": ("D", "where the same token stood before"),
    "induction": ("I", "what came after the same token before"),
}
_MEASURED = (
    "Scores are measured on random tokens that come twice, where nothing can be known but by looking back; those for "
    "duplicate token and induction count the second time."
)
# Heads of each kind that are named, and drawn where not all of them are.
_NAMED, _DRAWN = 6, 2


def heads(view: Heads, *, whole: bool = False) -> Page:
    """All heads by their kinds, and small maps: of the strongest of each kind, or of all where `whole`.

    A layer's heads with their scores, and all of their maps.
    """
    if view.layer is not None:
        return _layer(view, view.layer)
    strongest = {kind: [each for each in _by_score(view) if each.scores.kind == kind] for kind in _KINDS}
    rows = tuple(
        (
            Cell(f"{letter} {kind}"),
            Cell(str(len(strongest[kind]))),
            Cell(", ".join(f"{each.scores.name} {each.scores.best[1]:.2f}" for each in strongest[kind][:_NAMED])),
        )
        for kind, (letter, _) in _KINDS.items()
    )
    drawn = view.maps if whole else tuple(each for kind in _KINDS for each in strongest[kind][:_DRAWN])
    title = "What they look at in this text" + ("" if whole else ": the strongest of each kind")
    parts: list[PageBlock] = [
        _overview(view),
        Table(("kind", ">heads", "strongest, with their scores"), rows),
        Gallery(title, tuple(_small(view, each) for each in drawn)),
        _note(view, "/attention L5 shows the heads of layer 5, /attention L5.H3 one of them."),
    ]
    return Page("Attention heads", tuple(part for part in parts if not isinstance(part, Gallery) or part.maps), _SOURCE)


def _by_score(view: Heads) -> list[SmallMap]:
    return sorted(view.maps, key=lambda each: -each.scores.best[1])


def _overview(view: Heads) -> Heatmap:
    """In each field the letter of a head's kind, shaded by the score; the longer way goes down."""
    scores = [each.scores for each in view.maps]
    n_heads = 1 + max(each.head for each in scores)
    grid = [tuple(scores[i : i + n_heads]) for i in range(0, len(scores), n_heads)]
    down, across = "layer", "head"
    if n_heads > len(grid):
        grid = list(zip(*grid, strict=True))
        down, across = across, down
    return Heatmap(
        title=f"What kind each head looks like, shaded by its score: a row a {down}, a column a {across}",
        rows=tuple(f"{down[0].upper()}{i}" for i in range(len(grid))),
        columns=tuple(map(str, range(len(grid[0])))),
        values=tuple(tuple(each.best[1] for each in row) for row in grid),
        tokens=False,
        texts=tuple(tuple(_KINDS[each.kind][0] if each.kind else "·" for each in row) for row in grid),
        hovers=tuple(tuple(_scores(each) for each in row) for row in grid),
        first=0,
    )


def _four(scores: Scores) -> tuple[float, ...]:
    """In the order of `_KINDS`."""
    return scores.previous, scores.first, scores.duplicate, scores.induction


def _scores(scores: Scores) -> str:
    return f"{scores.name}: " + ", ".join(
        f"{kind} {score:.2f}" for kind, score in zip(_KINDS, _four(scores), strict=True)
    )


def _sentence(scores: Scores) -> str:
    kind, share = scores.best
    where = f"{percent(share)} of its attention goes to {_KINDS[kind][1]}."
    if not scores.kind:
        return f"{scores.name} looks like none of the four kinds: at most {where}"
    return f"{scores.name} looks like {'an' if kind == 'induction' else 'a'} {kind} head: {where}"


def _small(view: Heads, small: SmallMap) -> Heatmap:
    labels = tuple(token.text for token in view.tokens[:: small.step])
    scores = small.scores
    title = scores.name + (f" {_KINDS[scores.kind][0]} {scores.best[1]:.2f}" if scores.kind else "")
    return Heatmap(title, labels, labels, small.values, row_tokens=True)


def _note(view: Heads, more: str) -> Paragraph:
    step = view.maps[0].step
    each = "a token" if step == 1 else f"{step} tokens"
    maps = f"In a map each row and column is {each}, with the highest share of a row's attention that a column gets."
    return Paragraph(f"{_MEASURED} A score below 0.4 makes no kind (·). {maps} {more}", "dim")


def _layer(view: Heads, layer: int) -> Page:
    rows = tuple(
        (
            Cell(f"H{each.scores.head}"),
            *(Cell(f"{score:.2f}") for score in _four(each.scores)),
            Cell((each.scores.kind or "·").removesuffix(" token")),
        )
        for each in view.maps
    )
    return Page(
        f"Attention in layer {layer}",
        (
            Table(("head", ">prev.", ">first", ">dup.", ">ind.", "kind"), rows, f"The heads of layer {layer}"),
            Gallery("What they look at in this text", tuple(_small(view, each) for each in view.maps)),
            _note(view, f"/attention L{layer}.H0 shows one of them."),
        ),
        _SOURCE,
    )


def head(view: Head, first: int | None = None) -> Page:
    """A head's kind and scores, its map of the text, and what the last token looks at.

    first: the position that a narrow screen begins with, by default so that the last one is there.
    """
    scores, shown = view.scores, len(view.probs)
    end = view.first + shown
    tokens = [token.text for token in view.tokens[view.first : end]]
    values = [
        tuple(row[key] if key <= query else None for key in range(view.first, end))
        for query, row in enumerate(view.probs, view.first)
    ]
    columns = tokens
    if view.first:  # what stands in front of the window has one column
        columns = ["…", *tokens]
        values = [(sum(row[: view.first]), *shares) for row, shares in zip(view.probs, values, strict=True)]
    part = f" These are {shown} of {len(view.tokens):,}; /attention {scores.name} N begins at position N."
    note = "Each row is a token that looks, each column one that it may look at; a row's shares add up to 1." + (
        part if shown < len(view.tokens) else ""
    )
    return Page(
        f"Attention of {scores.name}",
        (
            Paragraph(_sentence(scores)),
            Table(
                ("kind", ">score"),
                tuple(
                    (Cell(kind), Cell(f"{score:.2f}", bar=score))
                    for kind, score in zip(_KINDS, _four(scores), strict=True)
                ),
            ),
            Heatmap(
                title=f"What the tokens look at through {scores.name}",
                rows=tuple(tokens),
                columns=tuple(columns),
                values=tuple(values),
                row_tokens=True,
                first=None if first is None else first - view.first,
                # Columns are numbered from the first one that is there.
                more="" if view.first else f"/attention {scores.name} {{}}",
            ),
            Table(
                (">at", "token", ">share"),
                tuple(
                    (
                        Cell(str(position)),
                        Cell(view.tokens[position].text, "cyan", token=True),
                        Cell(percent(share), bar=share),
                    )
                    for position, share in view.links
                ),
                "What the last token looks at most",
            ),
            Paragraph(f"{note} {_MEASURED}", "dim"),
        ),
        ("attention_map", "softmax"),
    )
