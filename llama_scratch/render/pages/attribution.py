"""Why that token, on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, PageBlock, Paragraph, Running, Table
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.attribution import AblationCheck, Attribution, Contribution, TokenInfluence

# Parts of the network, and tokens of the text, that one screen has room for.
_PARTS, _TOKENS = 10, 10
_GRADIENT = "Gradient is gradient × input: what the token's vector adds to the logit, to first order."


def page(found: Attribution) -> Page:
    """The answer, what speaks for it in the network and in the text, and the strongest claims tried out."""
    parts: list[PageBlock] = [_answer(found), _contributions(found), Paragraph(_sum(found), "dim"), _claims(found)]
    parts += [_influences(found), Paragraph(f"{_left_out(found)} {_GRADIENT}", "dim")]
    return Page("Why that token", tuple(parts), ("attribution",))


def _answer(found: Attribution) -> Running:
    cells = [
        Cell("What speaks for "),
        Cell(found.answer.text, "bold", token=True),
        Cell(f" ({percent(found.answer.probability)}) "),
    ]
    if found.versus:
        cells += [
            Cell("and not for "),
            Cell(found.versus.text, "bold", token=True),
            Cell(f" ({percent(found.versus.probability)}) "),
        ]
    logit = f": logits {found.logit:+.2f} apart." if found.versus else f": a logit of {found.logit:.2f}."
    return Running((*cells, Cell("after "), Cell(found.tokens[-1].text, "cyan", token=True), Cell(logit)))


def _contributions(found: Attribution) -> Table:
    strongest = sorted(found.contributions, key=lambda contribution: -abs(contribution.logit))
    reach = max(abs(strongest[0].logit), 1e-9)
    rows = [
        (Cell(c.name), Cell(f"{c.logit:+.2f}"), Cell("", bar=c.logit / reach, hover=_logit(c)))
        for c in strongest[:_PARTS]
    ]
    if rest := strongest[_PARTS:]:
        total = sum(contribution.logit for contribution in rest)
        words = f"{len(rest)} others"
        bar = max(-1.0, min(1.0, total / reach))
        rows.append((Cell(words, "dim"), Cell(f"{total:+.2f}", "dim"), Cell("", "dim", bar=bar, hover=words)))
    return Table(("part", ">logit", ""), tuple(rows), "What each part of the network adds")


def _sum(found: Attribution) -> str:
    what = "the difference of the logits" if found.versus else "the logit"
    if any(contribution.name == "interventions" for contribution in found.contributions):
        return (
            f"Together they are {what}: 'interventions' is what the others lack of it, because what was put into the "
            "stream is no part's own."
        )
    return (
        f"Together they are {what} but for {found.remainder:+.1e}, which is rounding: what each part writes into the "
        "residual stream, read through the unembedding with the scale of the last norm held."
    )


def _claims(found: Attribution) -> Table:
    rows = tuple((Cell(c.contribution.name, hover=_logit(c.contribution)), *_shift(found, c)) for c in found.claims)
    columns = ("part", *(f">{name}" for name in _names(found)))
    return Table(columns, rows, "The strongest of them, switched off")


def _logit(contribution: Contribution) -> str:
    return f"{contribution.name}: {contribution.logit:+.4f}"


def _names(found: Attribution) -> list[str]:
    return ["answer", "the other"] if found.versus else ["answer"]


def _shift(found: Attribution, claim: AblationCheck) -> list[Cell]:
    cells = [Cell(_moved(found.answer.probability, claim.after))]
    if found.versus and claim.versus_after is not None:
        cells.append(Cell(_moved(found.versus.probability, claim.versus_after)))
    return cells


def _moved(before: float, after: float) -> str:
    return f"{percent(before).removesuffix(' %')} → {percent(after)}"


def _influences(found: Attribution) -> Table:
    tried = [influence for influence in found.influences if influence.without is not None]
    tried.sort(key=lambda influence: influence.without or 0.0)
    shown = tried[:_TOKENS] or list(found.influences)[:_TOKENS]
    reach = max((abs(influence.gradient_x_input) for influence in found.influences), default=0.0) or 1.0
    rows = tuple(
        (
            Cell(influence.token.text, token=True, hover=f"position {influence.position}"),
            *_without(found, influence),
            Cell(f"{influence.gradient_x_input:+.2f}", hover=f"gradient × input {influence.gradient_x_input:+.4f}"),
            *([] if found.versus else [Cell("", bar=influence.gradient_x_input / reach)]),
        )
        for influence in shown
    )
    # A narrow screen has no room for bars beside two answers.
    columns = ("token", *(f">{name}" for name in _names(found)), ">gradient", *([] if found.versus else [""]))
    return Table(columns, rows, "What is said without each token of the text")


def _without(found: Attribution, influence: TokenInfluence) -> list[Cell]:
    cells = [Cell("" if influence.without is None else percent(influence.without))]
    if found.versus:
        cells.append(Cell("" if influence.versus_without is None else percent(influence.versus_without)))
    return cells


def _left_out(found: Attribution) -> str:
    tried = sum(influence.without is not None for influence in found.influences)
    if not tried:
        return "A text of one token has none to leave out."
    if tried < len(found.influences):
        return (
            f"{tried} of {len(found.influences):,} tokens were left out one by one, those that gradient × input ranks "
            "first; those without which the answer is least probable stand here."
        )
    return "Each token was left out once; those without which the answer is least probable come first."
