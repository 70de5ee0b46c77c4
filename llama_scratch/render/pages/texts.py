"""The answer, and the views of a text and of what may come next; `render.views` has their form on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from llama_scratch.render import views
from llama_scratch.render.page import Cell, Page, Paragraph, Part, Running, Table
from llama_scratch.render.terminal import percent, took
from llama_scratch.results import Candidate, Prediction

if TYPE_CHECKING:  # they bring torch
    from llama_scratch.microscope.choices import Choices
    from llama_scratch.microscope.compare import Comparison, Side
    from llama_scratch.microscope.diff import Diff
    from llama_scratch.microscope.surprisal import Scored, Surprisal
    from llama_scratch.microscope.tokens import Tokens
    from llama_scratch.microscope.tree import Branch, Tree


def answer(prediction: Prediction) -> Page:
    """The text, and what comes next with probabilities."""
    parts: list[Part] = [Running(tuple(Cell(token.text, token=True) for token in prediction.tokens))]
    parts.append(_candidates(prediction.top))
    parts.append(Paragraph(took(prediction), "dim"))
    return Page("What comes next", (*parts, *(Paragraph(sentence, "yellow") for sentence in prediction.warnings)))


def _candidates(top: Sequence[Candidate]) -> Table:
    rows = [
        (
            Cell(candidate.text, "" if rank else "bold", token=True),
            Cell(percent(candidate.probability)),
            Cell("", bar=candidate.probability, hover=f"id {candidate.id}, log-probability {candidate.logprob:.4f}"),
        )
        for rank, candidate in enumerate(top)
    ]
    return Table(("token", ">probability", ""), tuple(rows))


def tokens(found: Tokens) -> Page:
    """The text cut into its tokens, then each one's id, bytes and text."""
    styles = views._ALTERNATING
    pieces = [
        Cell(piece.text, styles[i % 2], token=True, hover=f"{piece.id}: {piece.bytes.hex(' ')}")
        for i, piece in enumerate(found.tokens)
    ]
    rows = [
        (Cell(str(piece.id)), Cell(piece.bytes.hex(" ")), Cell(piece.text, styles[i % 2], token=True))
        for i, piece in enumerate(found.tokens)
    ]
    count = Paragraph(views._count(len(found.tokens), "token") + ".", "dim")
    return Page("Tokens", (Running(tuple(pieces)), Table((">id", "bytes", "text"), tuple(rows)), count))


def surprisal(found: Surprisal, text: str, bits: Sequence[float | None]) -> Page:
    """The text coloured by how much it surprised, a legend, and the numbers of each token.

    bits: of each character of the text, as `per_character` gives them.
    """
    runs = groupby(zip(text, bits, strict=True), key=lambda pair: pair[1])
    coloured = [
        Cell(
            "".join(char for char, _ in run),
            views.surprise_style(of_run),
            token=True,
            hover="nothing predicts it" if of_run is None else f"{of_run:.1f} bits",
        )
        for of_run, run in runs
    ]
    limits = [(f"under {limit:g}", style) for limit, style in views._SURPRISE]
    legend = [Cell("Bits: ", "dim")]
    for words, style in [*limits, ("more", views._MOST_SURPRISING)]:
        legend += [Cell(words, style), Cell(" · ", "dim")]
    most = max((token.bits or 0.0 for token in found.tokens), default=0.0)
    table = Table(("token", ">prob.", ">rank", ">bits", ""), tuple(_score(token, most) for token in found.tokens))
    parts = Running(tuple(coloured)), Running(tuple(legend[:-1])), table, Paragraph(views._total(found), "dim")
    return Page("Surprisal", parts)


def _score(token: Scored, most: float) -> tuple[Cell, ...]:
    cell = Cell(token.text, views.surprise_style(token.bits), token=True)
    if token.probability is None or token.rank is None or token.bits is None:
        return cell, Cell(""), Cell(""), Cell(""), Cell("")
    bar = Cell("", bar=token.bits / (most or 1.0))
    return cell, Cell(percent(token.probability)), Cell(f"{token.rank:,}"), Cell(f"{token.bits:.1f}"), bar


def tree(found: Tree, text: str) -> Page:
    """A row for each branch: its number, token, probability, and that of the whole path to it."""
    table = Table(("branch", "token", "", ">prob.", ">path", ""), tuple(_branches(found.branches, "")))
    return Page("What may come next", (Running((Cell(text, "bold", token=True),)), table))


def _branches(branches: Sequence[Branch], path: str) -> Iterator[tuple[Cell, ...]]:
    for number, branch in enumerate(branches, start=1):
        level = path.count(".")
        yield (
            Cell(f"{path}{number}", "dim" if level else ""),
            Cell(branch.text, "" if level else "bold", token=True),
            Cell("end" if branch.stop else "", "dim"),
            Cell(percent(branch.probability)),
            Cell(percent(branch.path_probability)),
            Cell("", bar=branch.path_probability),
        )
        yield from _branches(branch.children, f"{path}{number}.")


def choices(found: Choices) -> Page:
    """A row for each choice, the most probable first."""
    rows = [
        (
            Cell(choice.text, "" if i else "bold", token=True),
            Cell(percent(choice.normalised)),
            Cell(percent(choice.by_length)),
            Cell("", bar=choice.normalised, hover=f"{views._count(len(choice.tokens), 'token')}"),
        )
        for i, choice in enumerate(found.ranked)
    ]
    table = Table(("choice", ">share", ">by length", ""), tuple(rows))
    return Page("Choices", (table, Paragraph(views._together(found), "dim")))


def diff(found: Diff) -> Page:
    """Both texts in one column, -/+ where they differ, with the divergence and both predictions after each token."""
    rows = []
    for mark, token, row in views._diff_rows(found):
        if isinstance(token, int):
            rows.append((Cell(""), Cell(f"{views._count(token, 'token')} alike", "dim"), *4 * [Cell("")]))
        elif row is None:
            style = "red" if mark == "-" else "green"
            rows.append((Cell(mark, style), Cell(token.text, style, token=True), *4 * [Cell("")]))
        else:
            bits, best, other = row
            second = Cell("same", "dim") if best.id == other.id else Cell(other.text, "bold", token=True)
            said = Cell(token.text, token=True), Cell(bits), Cell(best.text, token=True), second
            rows.append((Cell(""), *said, Cell("", bar=float(bits), hover=f"{bits} bits")))
    both = [
        (
            Cell(first.text, token=True),
            Cell(percent(first.probability)),
            Cell(second.text, token=True),
            Cell(percent(second.probability)),
        )
        for first, second in zip(found.first_top, found.second_top, strict=True)
    ]
    after = Table(("after the first", ">", "after the second", ">"), tuple(both))
    table = Table(("", "token", ">bits", "first", "second", ""), tuple(rows))
    return Page("Two texts", (table, after, Paragraph("\n".join(views._diff_summary(found)))))


def compare(found: Comparison) -> Page:
    """The best tokens of either model with the probability that each gives them."""
    rows = [
        (
            Cell(token.text, token=True),
            _share(token.first, found.first),
            _share(token.second, found.second),
        )
        for token in found.tokens
    ]
    table = Table(("token", *(f">{name}" for name in views._names(found))), tuple(rows))
    return Page("Two models", (table, Paragraph("\n".join(views._comparison(found)))))


def _share(candidate: Candidate | None, side: Side) -> Cell:
    """A probability; that of the model's best token stands out, with a mark."""
    if candidate is None:
        return Cell("no token", "dim")
    best = candidate.id == side.top[0].id
    return Cell(f"{'▸ ' * best}{percent(candidate.probability)}", "bold" * best)
