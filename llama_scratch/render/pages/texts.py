"""The answer, and the views of a text and of what may come next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from llama_scratch.render.answer import took
from llama_scratch.render.lines import json_line
from llama_scratch.render.page import Cell, Page, PageBlock, Paragraph, Running, Table
from llama_scratch.render.surprise import MOST_SURPRISING, STEPS, surprise_style
from llama_scratch.render.text import percent, visible
from llama_scratch.results import Candidate, Prediction, Token

if TYPE_CHECKING:  # they bring torch
    from llama_scratch.microscope.choices import Choices
    from llama_scratch.microscope.compare import Comparison, ModelPrediction
    from llama_scratch.microscope.diff import Diff
    from llama_scratch.microscope.surprisal import Scored, Surprisal
    from llama_scratch.microscope.tokens import Tokens
    from llama_scratch.microscope.tree import Branch, Tree

# Neighbors differ without colors too.
_ALTERNATING = ("cyan", "underline magenta")
_NOTHING = Cell("")


def answer(prediction: Prediction) -> Page:
    """The text, and what comes next with probabilities."""
    parts: list[PageBlock] = [Running(tuple(Cell(token.text, token=True) for token in prediction.tokens))]
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
    pieces = [
        Cell(piece.text, _ALTERNATING[i % 2], token=True, hover=f"{piece.id}: {piece.bytes.hex(' ')}")
        for i, piece in enumerate(found.tokens)
    ]
    rows = [
        (Cell(str(piece.id)), Cell(piece.bytes.hex(" ")), Cell(piece.text, _ALTERNATING[i % 2], token=True))
        for i, piece in enumerate(found.tokens)
    ]
    count = Paragraph(_count(len(found.tokens), "token") + ".", "dim")
    return Page("Tokens", (Running(tuple(pieces), spoken=False), Table((">id", "bytes", "text"), tuple(rows)), count))


def surprisal(found: Surprisal, text: str, bits: Sequence[float | None]) -> Page:
    """The text colored by how much it surprised, a legend, and the numbers of each token.

    bits: of each character of the text, as `per_character` gives them.
    """
    runs = groupby(zip(text, bits, strict=True), key=lambda pair: pair[1])
    colored = [
        Cell(
            "".join(char for char, _ in run),
            surprise_style(of_run),
            token=True,
            hover="nothing predicts it" if of_run is None else f"{of_run:.1f} bits",
        )
        for of_run, run in runs
    ]
    legend = [Cell("Bits: ", "dim")]
    for words, style in [*((f"under {limit:g}", style) for limit, style in STEPS), ("more", MOST_SURPRISING)]:
        legend += [Cell(words, style), Cell(" · ", "dim")]
    most = max((token.bits or 0.0 for token in found.tokens), default=0.0)
    table = Table(("token", ">prob.", ">rank", ">bits", ""), tuple(_score(token, most) for token in found.tokens))
    text_and_legend = (Running(tuple(cells), spoken=False) for cells in (colored, legend[:-1]))
    return Page("Surprisal", (*text_and_legend, table, Paragraph(_total(found), "dim")))


def _score(token: Scored, most: float) -> tuple[Cell, ...]:
    cell = Cell(token.text, surprise_style(token.bits), token=True)
    if token.probability is None or token.rank is None or token.bits is None:
        return cell, Cell("", said="which nothing predicts"), _NOTHING, _NOTHING, _NOTHING
    bar = Cell("", bar=token.bits / (most or 1.0))
    return cell, Cell(percent(token.probability)), Cell(f"{token.rank:,}"), Cell(f"{token.bits:.1f}"), bar


def _total(found: Surprisal) -> str:
    if found.perplexity is None:
        return "Nothing predicts a first token, and there is no other."
    scored = sum(token.bits is not None for token in found.tokens)
    return f"{found.bits:.1f} bits for {_count(scored, 'token')}, perplexity {found.perplexity:,.2f}."


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


# --- What may come next -----------------------------------------------------------------------


def tree(found: Tree, text: str) -> Page:
    """The branches with their numbers, each one's probability and that of the whole path to it.

    text: that of the prompt, of which the end is shown.
    """
    end = text[-24:]
    levels, rows = zip(*_branches(found.branches, ""), strict=True)
    columns = "branch", "token", ">probability", ">path", ""
    table = Table(columns, rows, json_line("…" * (end != text) + end), levels=levels)
    note = Cell("In brackets: the whole path. /tree 1.2 goes there, /tree .. goes back.", "dim")
    return Page("What may come next", (table, Running((note,), spoken=False)))


def _branches(branches: Sequence[Branch], path: str) -> Iterator[tuple[int, tuple[Cell, ...]]]:
    """The rows of the branches behind a path, each with its level."""
    for number, branch in enumerate(branches, start=1):
        whole = percent(branch.path_probability)
        yield (
            path.count("."),
            (
                Cell(f"{path}{number}", "dim"),
                Cell(branch.text, "bold", token=True),
                Cell(percent(branch.probability)),
                Cell(f"({whole})", "dim", said=f"path {whole}") if path else _NOTHING,
                Cell("end" * branch.stop, "dim", bar=branch.path_probability, said="the text ends" * branch.stop),
            ),
        )
        yield from _branches(branch.children, f"{path}{number}.")


def choices(found: Choices) -> Page:
    """The choices, the most probable first, each with its share of the probability of all of them."""
    rows = []
    for i, choice in enumerate(found.ranked):
        style, length = "" if i else "bold", _count(len(choice.tokens), "token")
        share, by_length = percent(choice.normalized), percent(choice.by_length)
        row = (
            Cell(choice.text, style, token=True),
            Cell(share, style, said=f"{share} of these choices"),
            Cell(by_length, said=f"{by_length} by length"),
            Cell("", bar=choice.normalized, hover=length, said=length),
        )
        rows.append(row)
    together = f"One of them comes next with a probability of {percent(found.probability)}."
    table = Table(("choice", ">share", ">by length", ""), tuple(rows))
    return Page("Choices", (table, Paragraph(together, "dim")))


# --- Two texts, and two models ----------------------------------------------------------------


def diff(found: Diff) -> Page:
    """Both texts in one column, -/+ where they differ, with the divergence and both predictions after each token."""
    after = [
        (
            Cell(first.text, token=True),
            Cell(percent(first.probability)),
            Cell(second.text, token=True),
            Cell(percent(second.probability)),
        )
        for first, second in zip(found.first_top, found.second_top, strict=True)
    ]
    tables = (
        Table(("", "token", ">bits", "first", "second", ""), tuple(_diff_rows(found))),
        Table(("after the first", ">", "after the second", ">"), tuple(after)),
    )
    return Page("Two texts", (*tables, Paragraph("\n".join(_diff_summary(found)))))


def _diff_rows(found: Diff) -> Iterator[tuple[Cell, ...]]:
    """Tokens in order: those of the first text alone, those of the second alone, and those of both with the
    divergence and the predictions after them. A number stands for so many at the beginning that are alike."""
    i = j = max(0, found.shared - 1)
    if i:
        alike = f"{_count(i, 'token')} alike"
        yield _NOTHING, Cell(alike, "dim", said=alike), *4 * [_NOTHING]
    for pair in found.pairs[i:]:
        yield from _apart(found.first[i : pair.first], found.second[j : pair.second])
        best, other, bits = pair.first_next, pair.second_next, f"{pair.jsd_bits:.2f}"
        yield (
            Cell("", said="in both"),
            Cell(pair.token.text, token=True),
            Cell(bits),
            Cell(best.text, token=True),
            Cell("same", "dim") if best.id == other.id else Cell(other.text, "bold", token=True),
            Cell("", bar=pair.jsd_bits, hover=f"{bits} bits"),
        )
        i, j = pair.first + 1, pair.second + 1
    yield from _apart(found.first[i:], found.second[j:])


def _apart(first: Sequence[Token], second: Sequence[Token]) -> Iterator[tuple[Cell, ...]]:
    sides = (first, "-", "red", "only in the first"), (second, "+", "green", "only in the second")
    for tokens, mark, style, said in sides:
        for token in tokens:
            yield Cell(mark, style, said=said), Cell(token.text, style, token=True), *4 * [_NOTHING]


def _diff_summary(found: Diff) -> list[str]:
    lines = []
    if pair := found.parting:
        best, other = visible(pair.first_next.text).plain, visible(pair.second_next.text).plain
        lines.append(f"The predictions part after {visible(pair.token.text).plain}: {best} and {other}.")
    return [*lines, f"At the end they are {found.jsd_bits:.2f} bits apart (0: the same, 1: nothing in common)."]


def compare(found: Comparison) -> Page:
    """The best tokens of either model with the probability that each gives them."""
    names = _names(found)
    rows = [
        (
            Cell(token.text, token=True),
            _share(token.first, found.first, names[0]),
            _share(token.second, found.second, names[1]),
        )
        for token in found.tokens
    ]
    table = Table(("token", *(f">{name}" for name in names)), tuple(rows))
    return Page("Two models", (table, Paragraph("\n".join(_comparison(found)))))


def _share(candidate: Candidate | None, side: ModelPrediction, name: str) -> Cell:
    """A probability; that of the model's best token stands out, with a mark."""
    if candidate is None:
        return Cell("no token", "dim", said=f"{name} has no such token")
    share = percent(candidate.probability)
    if candidate.id == side.top[0].id:
        return Cell(f"▸ {share}", "bold", said=f"{name} {share} and the best")
    return Cell(share)


def _names(found: Comparison) -> tuple[str, str]:
    """What tells the models apart in short: their precisions, where it is one model in two."""
    a, b = found.first.model, found.second.model
    return (a.precision, b.precision) if a.name == b.name and a.precision != b.precision else ("first", "second")


def _comparison(found: Comparison) -> list[str]:
    names = _names(found)
    models = [f"{side.model.name} in {side.model.precision}" for side in (found.first, found.second)]
    lines = [f"{name}: {model}" for name, model in zip(names, models, strict=True) if name not in model]
    if found.kl_bits is None:
        lines.append("Their vocabularies differ, so tokens are compared by their text.")
    else:
        lines.append(f"KL divergence of {names[1]} from {names[0]}: {found.kl_bits:.3g} bits.")
    return [*lines, f"Entropies: {found.first.entropy_bits:.2f} and {found.second.entropy_bits:.2f} bits."]
