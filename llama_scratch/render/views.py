"""What the microscope found, for people: tables and colours, or the same as plain lines.

Colours are the terminal's own 16, and nothing is said by them alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as Branches

from llama_scratch.render.lines import json_line
from llama_scratch.render.terminal import Bar, percent, visible
from llama_scratch.results import Candidate, Token

if TYPE_CHECKING:  # they bring torch
    from llama_scratch.microscope.choices import Choices
    from llama_scratch.microscope.compare import Comparison, Side
    from llama_scratch.microscope.diff import Diff
    from llama_scratch.microscope.surprisal import Surprisal
    from llama_scratch.microscope.tokens import Tokens
    from llama_scratch.microscope.tree import Branch, Tree

# Bits below which a token has a style; what surprises more has the last one.
_SURPRISE = ((1.0, "green"), (4.0, ""), (8.0, "magenta"))
_MOST_SURPRISING = "bold red"
# Neighbours differ without colours too.
_ALTERNATING = ("cyan", "underline magenta")


def surprise_style(bits: float | None) -> str:
    """The style of a token by its surprisal: words for bold and the like, and names of ANSI colours."""
    if bits is None:
        return ""
    return next((style for limit, style in _SURPRISE if bits < limit), _MOST_SURPRISING)


# --- The pieces of a view ---------------------------------------------------------------------


def _view(*parts: RenderableType) -> RenderableType:
    """Parts below each other, an empty line around each."""
    return Group(*(Padding(part, (1, 0, 0, 1)) for part in parts), Text())


def _table(*columns: str, expand: bool = False) -> Table:
    """A table without lines; of its columns those that begin with ">" are numbers. Texts fold where room is scarce."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", expand=expand)
    for name in columns:
        if name.startswith(">"):
            table.add_column(name[1:], justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    return table


def _lines(lines: Iterable[str]) -> Text:
    return Text("\n".join(lines))


def _quoted(text: str) -> str:
    """A text as JSON, with nothing in it that a terminal hides or obeys."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in json_line(text))


def _said(candidate: Candidate) -> str:
    return f"{_quoted(candidate.text)}, {percent(candidate.probability)}"


def _running(parts: Iterable[tuple[str, str]]) -> Text:
    """A text in one piece from its parts with their styles; line breaks are visible, and break the line."""
    shown = Text(overflow="fold")
    for text, style in parts:
        shown.append_text(visible(text, style))
        if "\n" in text:
            shown.append("\n")
    return shown


def _note(sentence: str) -> Text:
    return Text(sentence, style="dim")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


# --- Tokens -----------------------------------------------------------------------------------


def tokens(found: Tokens) -> RenderableType:
    """The text cut into its tokens, then each one's id, bytes and text."""
    text = _running((piece.text, _ALTERNATING[i % 2]) for i, piece in enumerate(found.tokens))
    table = _table(">id", "bytes", "text")
    for i, piece in enumerate(found.tokens):
        table.add_row(str(piece.id), piece.bytes.hex(" "), visible(piece.text, _ALTERNATING[i % 2]))
    return _view(text, table, _note(_count(len(found.tokens), "token") + "."))


def plain_tokens(found: Tokens) -> Text:
    """A line for each token."""
    lines = [f"{piece.id}: {_quoted(piece.text)}, bytes {piece.bytes.hex(' ')}" for piece in found.tokens]
    return _lines([*lines, _count(len(found.tokens), "token") + "."])


# --- Surprisal --------------------------------------------------------------------------------


def surprisal(found: Surprisal, text: str, bits: Sequence[float | None]) -> RenderableType:
    """The text coloured by how much it surprised, a legend, and the numbers of each token.

    bits: of each character of the text, as `per_character` gives them.
    """
    runs = groupby(zip(text, bits, strict=True), key=lambda pair: pair[1])
    coloured = _running(("".join(char for char, _ in run), surprise_style(bits)) for bits, run in runs)
    table = _table("token", ">prob.", ">rank", ">bits")
    for token in found.tokens:
        shown = visible(token.text, surprise_style(token.bits))
        if token.probability is None or token.rank is None or token.bits is None:
            table.add_row(shown, "", "", "")
        else:
            table.add_row(shown, percent(token.probability), f"{token.rank:,}", f"{token.bits:.1f}")
    return _view(coloured, _legend(), table, _note(_total(found)))


def _legend() -> Text:
    legend = Text("Bits: ", style="dim")
    for limit, style in _SURPRISE:
        legend.append(f"under {limit:g}", style=f"not dim {style}").append(" · ")
    return legend.append("more", style=f"not dim {_MOST_SURPRISING}")


def _total(found: Surprisal) -> str:
    if found.perplexity is None:
        return "Nothing predicts a first token, and there is no other."
    scored = sum(token.bits is not None for token in found.tokens)
    return f"{found.bits:.1f} bits for {_count(scored, 'token')}, perplexity {found.perplexity:,.2f}."


def plain_surprisal(found: Surprisal) -> Text:
    """A line for each token."""
    lines = []
    for token in found.tokens:
        if token.probability is None or token.rank is None or token.bits is None:
            lines.append(f"{_quoted(token.text)}, which nothing predicts")
        else:
            numbers = f"{percent(token.probability)}, rank {token.rank:,}, {token.bits:.1f} bits"
            lines.append(f"{_quoted(token.text)}, {numbers}")
    return _lines([*lines, _total(found)])


# --- Tree -------------------------------------------------------------------------------------


def tree(found: Tree, text: str) -> RenderableType:
    """The branches with their numbers, each one's probability and that of the whole path to it.

    text: that of the prompt, of which the end is shown.
    """
    end = text[-24:]
    root = Branches(visible("…" * (end != text) + end, "bold"), guide_style="dim")
    _grow(root, found.branches, "")
    return _view(root, _note("In brackets: the whole path. /tree 1.2 goes there, /tree .. goes back."))


def _grow(parent: Branches, branches: Sequence[Branch], path: str) -> None:
    for number, branch in enumerate(branches, start=1):
        label = Text.assemble((f"{path}{number}", "dim"), " ", visible(branch.text, "bold"), overflow="fold")
        label.append(f" {_unbroken(branch.probability)}")
        if path:
            label.append(f" ({_unbroken(branch.path_probability)})", style="dim")
        if branch.stop:
            label.append(" end", style="dim")
        _grow(parent.add(label), branch.children, f"{path}{number}.")


def _unbroken(probability: float) -> str:
    return percent(probability).replace(" ", "\xa0")


def plain_tree(found: Tree) -> Text:
    """A line for each branch, with its number in front."""
    return _lines(_branch_lines(found.branches, ""))


def _branch_lines(branches: Sequence[Branch], path: str) -> Iterator[str]:
    for number, branch in enumerate(branches, start=1):
        whole = f", path {percent(branch.path_probability)}" if path else ""
        yield f"{path}{number}: {_said(branch)}{whole}{', the text ends' if branch.stop else ''}"
        yield from _branch_lines(branch.children, f"{path}{number}.")


# --- Choices ----------------------------------------------------------------------------------


def choices(found: Choices) -> RenderableType:
    """The choices, the most probable first, each with its share of the probability of all of them."""
    table = _table("choice", ">share", ">by length", expand=True)
    table.add_column("", ratio=1)
    for i, choice in enumerate(found.ranked):
        style = "" if i else "bold"
        share, mean = Text(percent(choice.normalised), style=style), percent(choice.by_length)
        table.add_row(visible(choice.text, style), share, mean, Bar(choice.normalised))
    return _view(table, _note(_together(found)))


def _together(found: Choices) -> str:
    return f"One of them comes next with a probability of {percent(found.probability)}."


def plain_choices(found: Choices) -> Text:
    """A line for each choice, the most probable first."""
    lines = [
        f"{_quoted(choice.text)}, {percent(choice.normalised)} of these choices, "
        f"{percent(choice.by_length)} by length, {_count(len(choice.tokens), 'token')}"
        for choice in found.ranked
    ]
    return _lines([*lines, _together(found)])


# --- Diff -------------------------------------------------------------------------------------


def diff(found: Diff) -> RenderableType:
    """Both texts in one column, -/+ where they differ, with the divergence and both predictions after each token."""
    table = _table("", "token", ">bits", "first", "second")
    for mark, token, row in _diff_rows(found):
        if isinstance(token, int):
            table.add_row("", _note(f"{_count(token, 'token')} alike"), "", "", "")
        elif row is None:
            style = "red" if mark == "-" else "green"
            table.add_row(Text(mark, style=style), visible(token.text, style), "", "", "")
        else:
            jsd, best, other = row
            second = _note("same") if best.id == other.id else visible(other.text, "bold")
            table.add_row("", visible(token.text), jsd, visible(best.text), second)
    return _view(table, _two_columns(found), _lines(_diff_summary(found)))


_Row = tuple[str, Token | int, tuple[str, Candidate, Candidate] | None]


def _diff_rows(found: Diff) -> Iterator[_Row]:
    """Tokens in order: "-" those of the first text alone, "+" those of the second alone, "" those of both with
    the divergence and the predictions after them. A number stands for so many at the beginning that are alike."""
    i = j = max(0, found.shared - 1)
    if i:
        yield "", i, None
    for pair in found.pairs[i:]:
        yield from _apart(found, i, pair.first, j, pair.second)
        yield "", pair.token, (f"{pair.jsd_bits:.2f}", pair.first_next, pair.second_next)
        i, j = pair.first + 1, pair.second + 1
    yield from _apart(found, i, len(found.first), j, len(found.second))


def _apart(found: Diff, i: int, end_i: int, j: int, end_j: int) -> Iterator[_Row]:
    yield from (("-", token, None) for token in found.first[i:end_i])
    yield from (("+", token, None) for token in found.second[j:end_j])


def _two_columns(found: Diff) -> Table:
    """What comes after each text, beside each other."""
    table = _table("after the first", ">", "after the second", ">")
    for first, second in zip(found.first_top, found.second_top, strict=True):
        shown = visible(first.text), percent(first.probability), visible(second.text), percent(second.probability)
        table.add_row(*shown)
    return table


def _diff_summary(found: Diff) -> list[str]:
    lines = []
    if pair := found.parting:
        best, other = visible(pair.first_next.text).plain, visible(pair.second_next.text).plain
        lines.append(f"The predictions part after {visible(pair.token.text).plain}: {best} and {other}.")
    return [*lines, f"At the end they are {found.jsd_bits:.2f} bits apart (0: the same, 1: nothing in common)."]


def plain_diff(found: Diff) -> Text:
    """A line for each token, then what comes after each text."""
    lines = []
    for mark, token, row in _diff_rows(found):
        if isinstance(token, int):
            lines.append(f"{_count(token, 'token')} alike")
        elif row is None:
            lines.append(f"Only in the {'first' if mark == '-' else 'second'}: {_quoted(token.text)}")
        else:
            jsd, best, other = row
            predictions = f"first {_quoted(best.text)}, second {_quoted(other.text)}"
            lines.append(f"In both: {_quoted(token.text)}, then {jsd} bits apart, {predictions}")
    lines += [f"After the first: {_said(candidate)}" for candidate in found.first_top]
    lines += [f"After the second: {_said(candidate)}" for candidate in found.second_top]
    return _lines(lines + _diff_summary(found))


# --- Compare ----------------------------------------------------------------------------------


def compare(found: Comparison) -> RenderableType:
    """The best tokens of either model with the probability that each gives them."""
    table = _table("token", *(f">{name}" for name in _names(found)))
    for token in found.tokens:
        shares = _share(token.first, found.first), _share(token.second, found.second)
        table.add_row(visible(token.text), *shares)
    return _view(table, _lines(_comparison(found)))


def _share(candidate: Candidate | None, side: Side) -> Text:
    """A probability; that of the model's best token stands out, with a mark."""
    if candidate is None:
        return Text("no token", style="dim")
    best = candidate.id == side.top[0].id
    return Text(("▸ " if best else "") + percent(candidate.probability), style="bold" if best else "")


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


def plain_compare(found: Comparison) -> Text:
    """A line for each token that either model has among its best."""
    names = _names(found)
    lines = []
    for token in found.tokens:
        both = zip(names, (token.first, token.second), strict=True)
        shares = [f"{name} {percent(c.probability) if c else 'has no such token'}" for name, c in both]
        lines.append(f"{_quoted(token.text)}: {', '.join(shares)}")
    return _lines(lines + _comparison(found))
