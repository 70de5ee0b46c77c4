"""Attention patterns of heads, and head types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import (
    Cell,
    Finding,
    Gallery,
    Heatmap,
    Page,
    PageBlock,
    Paragraph,
    Table,
    Window,
    written,
)
from llama_scratch.render.scale import Kind, Scale
from llama_scratch.render.text import changes, percent

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.attention import Head, Heads, Scores, SmallMap

_SOURCE = ("head_scores", "softmax")
# The letter of each kind of head, and the token that it attends to.
_KINDS = {
    "previous token": ("P", "the previous token"),
    "first token": ("F", "the first token"),
    "duplicate token": ("D", "the earlier occurrence of the same token"),
    "induction": ("I", "the token after its earlier occurrence"),
}
# First-token heads are the most frequent and do least, so they are gray.
_HUES = {"previous token": "blue", "first token": "gray", "duplicate token": "amber", "induction": "pink"}
_MEASURED = (
    "Scores are mean attention on a repeated sequence of random tokens. Duplicate-token and induction scores are "
    "over the second half."
)
# Maximum number of heads per kind that are named, and that are drawn.
_NAMED, _DRAWN = 6, 2
# The color scale of attention patterns.
_SHARES = Scale(legend="attention", percent=True)
# Minimum share of attention at which a token "looks at" another token.
_LOOKS = 0.5


def heads(view: Heads, *, whole: bool = False) -> Page:
    """Return a page of all heads by kind, or of the heads of one layer.

    Args:
        view: The heads.
        whole: Draw the maps of all heads instead of the strongest of each kind.
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
    title = "Attention patterns on this text" + ("" if whole else ": highest scores of each type")
    parts: list[PageBlock] = [
        Finding(heads_finding(view)),
        _overview(view),
        Table(("type", ">heads", "highest scores"), rows),
        Gallery(title, tuple(_small(view, each) for each in drawn), _n_heads(view) if whole else 0),
        _note(view, "/attention L5 shows the heads of layer 5, /attention L5.H3 shows head 3."),
    ]
    return Page("Attention heads", tuple(part for part in parts if not isinstance(part, Gallery) or part.maps), _SOURCE)


def heads_finding(view: Heads) -> str:
    """Count the heads of each kind, and name the strongest induction head."""
    kinds = {kind: [each.scores for each in _by_score(view) if each.scores.kind == kind] for kind in _KINDS}
    found = sorted((kind for kind in kinds if kinds[kind]), key=lambda kind: -len(kinds[kind]))
    where = f"the {len(view.maps)} heads" + ("" if view.layer is None else f" of layer {view.layer}")
    if not found:
        return f"On random tokens, none of {where} is of one of the four types."
    counts = [f"{len(kinds[kind])} {kind.replace(' ', '-')}" for kind in found]
    listed = counts[0] if len(counts) == 1 else f"{', '.join(counts[:-1])} and {counts[-1]}"
    plural = "head" if counts[-1].startswith("1 ") else "heads"
    sentence = f"On random tokens, {where} include {listed} {plural}."
    best = kinds["induction"][:1]
    return sentence + (f" The strongest induction head is {best[0].name} ({best[0].best[1]:.2f})." if best else "")


def _n_heads(view: Heads) -> int:
    """Number of heads per layer."""
    return 1 + max(each.scores.head for each in view.maps)


def _by_score(view: Heads) -> list[SmallMap]:
    return sorted(view.maps, key=lambda each: -each.scores.best[1])


def _overview(view: Heads) -> Heatmap:
    """A map of the heads by kind, shaded by score. Rows are heads, columns are layers."""
    scores = [each.scores for each in view.maps]
    n_heads = _n_heads(view)
    grid = [scores[head::n_heads] for head in range(n_heads)]
    kinds = (Kind(_KINDS[kind][0], kind, hue) for kind, hue in _HUES.items())
    return Heatmap(
        title="Heads by kind: rows are heads, columns are layers",
        rows=tuple(f"H{head}" for head in range(n_heads)),
        columns=tuple(str(each.layer) for each in grid[0]),
        values=tuple(tuple(each.best[1] for each in row) for row in grid),
        tokens=False,
        texts=tuple(tuple(_KINDS[each.kind][0] if each.kind else "·" for each in row) for row in grid),
        hovers=tuple(tuple(_scores(each) for each in row) for row in grid),
        scale=Scale(legend="score", kinds=(*kinds, Kind("·", "none of these", "gray"))),
        window=Window(0),
    )


def _four(scores: Scores) -> tuple[float, ...]:
    """The scores in the order of `_KINDS`."""
    return scores.previous, scores.first, scores.duplicate, scores.induction


def _scores(scores: Scores) -> str:
    return f"{scores.name}: " + ", ".join(
        f"{kind} {score:.2f}" for kind, score in zip(_KINDS, _four(scores), strict=True)
    )


def _sentence(scores: Scores) -> str:
    kind, share = scores.best
    where = f"{percent(share)} of its attention goes to {_KINDS[kind][1]}."
    if not scores.kind:
        return f"{scores.name} fits none of the four types: on random tokens, at most {where}"
    name = f"{'an' if kind == 'induction' else 'a'} {kind.replace(' ', '-')} head"
    return f"{scores.name} looks like {name}: on random tokens, {where}"


def _small(view: Heads, small: SmallMap) -> Heatmap:
    labels = tuple(token.text for token in view.tokens[:: small.step])
    scores = small.scores
    title = scores.name + (f" {_KINDS[scores.kind][0]} {scores.best[1]:.2f}" if scores.kind else "")
    return Heatmap(
        title,
        labels,
        labels,
        small.values,
        _SHARES,
        row_tokens=True,
        says="{row} attends to {column}: {value}.",
    )


def _note(view: Heads, more: str) -> Paragraph:
    step = view.maps[0].step
    each = "one token" if step == 1 else f"{step} tokens"
    maps = f"In a pattern, rows are queries and columns are keys, {each} each; a cell is the maximum attention in it."
    return Paragraph(f"{_MEASURED} A head with all scores below 0.4 has no type (·). {maps} {more}", "dim")


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
            Finding(heads_finding(view)),
            Table(("head", ">prev.", ">first", ">dup.", ">ind.", "type"), rows, f"Heads of layer {layer}"),
            Gallery("Attention patterns on this text", tuple(_small(view, each) for each in view.maps), _n_heads(view)),
            _note(view, f"/attention L{layer}.H0 shows head 0."),
        ),
        _SOURCE,
    )


def head(view: Head, first: int | None = None) -> Page:
    """Return a page of one head: what it does in this text, then its kind.

    Args:
        view: The head.
        first: The first position on a narrow screen. By default the last position is shown.
    """
    scores, shown = view.scores, len(view.probs)
    part = f" Shown: {shown} of {len(view.tokens):,} positions. /attention {scores.name} N starts at position N."
    note = "Rows are queries, columns are keys; each row adds up to 1." + (part if shown < len(view.tokens) else "")
    kinds = zip(_KINDS, _four(scores), strict=True)
    return Page(
        f"Attention of {scores.name}",
        (
            Finding(finding(view)),
            _links(view),
            _pattern(view, first),
            Paragraph(_sentence(scores)),
            Table(("type", ">score"), tuple((Cell(kind), Cell(f"{score:.2f}", bar=score)) for kind, score in kinds)),
            Paragraph(f"{note} {_MEASURED}", "dim"),
        ),
        ("attention_map", "softmax"),
    )


def finding(view: Head) -> str:
    """State the attention of the last token, and the answer without the head."""
    position, share = view.links[0]
    name, last = view.scores.name, _token(view, len(view.tokens) - 1)
    there = "itself" if position == len(view.tokens) - 1 else _token(view, position)
    if share >= _LOOKS:
        looks = f"Through {name}, {last} looks at {there} ({percent(share)} of its attention)."
    else:
        looks = (
            f"Through {name}, {last} looks at no single token: at most {percent(share)} of its attention, at {there}."
        )
    answer = changes(view.answer.probability, view.ablated.probability)
    return f"{looks} Without this head, {written(view.answer.text, token=True)} {answer}."


def _token(view: Head, position: int) -> str:
    """A token of the text, with its position if it occurs more than once."""
    token = view.tokens[position]
    several = sum(other.id == token.id for other in view.tokens) > 1
    return written(token.text, token=True) + (f" at position {position}" if several else "")


def _links(view: Head) -> Table:
    last = written(view.tokens[-1].text, token=True)
    rows = tuple(
        (
            Cell(str(position)),
            Cell(view.tokens[position].text, "cyan", token=True),
            Cell(percent(share), bar=share, hover=f"{last} looks at {_token(view, position)}: {percent(share)}"),
        )
        for position, share in view.links
    )
    return Table((">position", "token", ">attention"), rows, f"Attention from the last token, {last}")


def _pattern(view: Head, first: int | None) -> Heatmap:
    name, end = view.scores.name, view.first + len(view.probs)
    tokens = [token.text for token in view.tokens[view.first : end]]
    values = [
        tuple(row[key] if key <= query else None for key in range(view.first, end))
        for query, row in enumerate(view.probs, view.first)
    ]
    columns = tokens
    if view.first:  # one column for all keys before the window
        columns = ["…", *tokens]
        values = [(sum(row[: view.first]), *shares) for row, shares in zip(view.probs, values, strict=True)]
    return Heatmap(
        title=f"Attention pattern of {name}",
        rows=tuple(tokens),
        columns=tuple(columns),
        values=tuple(values),
        scale=_SHARES,
        row_tokens=True,
        window=Window(
            None if first is None else first - view.first,
            # Column numbers are positions only if the window starts at 0.
            "" if view.first else f"/attention {name} {{}}",
        ),
        says="{row} looks at {column}: {value}",
    )
