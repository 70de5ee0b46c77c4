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


def page(why: Attribution) -> Page:
    """The answer, what speaks for it in the network and in the text, and the strongest claims tried out."""
    parts: list[PageBlock] = [_answer(why), _contributions(why), Paragraph(_sum(why), "dim"), _claims(why)]
    parts += [_influences(why), Paragraph(f"{_left_out(why)} {_GRADIENT}", "dim")]
    return Page("Why that token", tuple(parts), ("attribution",))


def _answer(why: Attribution) -> Running:
    cells = [
        Cell("What speaks for "),
        Cell(why.answer.text, "bold", token=True),
        Cell(f" ({percent(why.answer.probability)}) "),
    ]
    if why.versus:
        cells += [
            Cell("and not for "),
            Cell(why.versus.text, "bold", token=True),
            Cell(f" ({percent(why.versus.probability)}) "),
        ]
    logit = f": logits {why.logit:+.2f} apart." if why.versus else f": a logit of {why.logit:.2f}."
    return Running((*cells, Cell("after "), Cell(why.tokens[-1].text, "cyan", token=True), Cell(logit)))


def _contributions(why: Attribution) -> Table:
    strongest = sorted(why.contributions, key=lambda contribution: -abs(contribution.logit))
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


def _sum(why: Attribution) -> str:
    what = "the difference of the logits" if why.versus else "the logit"
    if any(contribution.name == "interventions" for contribution in why.contributions):
        return (
            f"Together they are {what}: 'interventions' is what the others lack of it, because what was put into the "
            "stream is no part's own."
        )
    return (
        f"Together they are {what} but for {why.remainder:+.1e}, which is rounding: what each part writes into the "
        "residual stream, read through the unembedding with the scale of the last norm held."
    )


def _claims(why: Attribution) -> Table:
    rows = tuple((Cell(c.contribution.name, hover=_logit(c.contribution)), *_shift(why, c)) for c in why.claims)
    columns = ("part", *(f">{name}" for name in _names(why)))
    return Table(columns, rows, "The strongest of them, switched off")


def _logit(contribution: Contribution) -> str:
    return f"{contribution.name}: {contribution.logit:+.4f}"


def _names(why: Attribution) -> list[str]:
    return ["answer", "the other"] if why.versus else ["answer"]


def _shift(why: Attribution, claim: AblationCheck) -> list[Cell]:
    cells = [Cell(_moved(why.answer.probability, claim.after))]
    if why.versus and claim.versus_after is not None:
        cells.append(Cell(_moved(why.versus.probability, claim.versus_after)))
    return cells


def _moved(before: float, after: float) -> str:
    return f"{percent(before).removesuffix(' %')} → {percent(after)}"


def _influences(why: Attribution) -> Table:
    tried = [influence for influence in why.influences if influence.without is not None]
    tried.sort(key=lambda influence: influence.without or 0.0)
    shown = tried[:_TOKENS] or list(why.influences)[:_TOKENS]
    reach = max((abs(influence.gradient_x_input) for influence in why.influences), default=0.0) or 1.0
    rows = tuple(
        (
            Cell(influence.token.text, token=True, hover=f"position {influence.position}"),
            *_without(why, influence),
            Cell(f"{influence.gradient_x_input:+.2f}", hover=f"gradient × input {influence.gradient_x_input:+.4f}"),
            *([] if why.versus else [Cell("", bar=influence.gradient_x_input / reach)]),
        )
        for influence in shown
    )
    # A narrow screen has no room for bars beside two answers.
    columns = ("token", *(f">{name}" for name in _names(why)), ">gradient", *([] if why.versus else [""]))
    return Table(columns, rows, "What is said without each token of the text")


def _without(why: Attribution, influence: TokenInfluence) -> list[Cell]:
    cells = [Cell("" if influence.without is None else percent(influence.without))]
    if why.versus:
        cells.append(Cell("" if influence.versus_without is None else percent(influence.versus_without)))
    return cells


def _left_out(why: Attribution) -> str:
    tried = sum(influence.without is not None for influence in why.influences)
    if not tried:
        return "A text of one token has none to leave out."
    if tried < len(why.influences):
        return (
            f"{tried} of {len(why.influences):,} tokens were left out one by one, those that gradient × input ranks "
            "first; those without which the answer is least probable stand here."
        )
    return "Each token was left out once; those without which the answer is least probable come first."
