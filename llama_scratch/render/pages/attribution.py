"""Attribution of a logit, on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Page, PageBlock, Paragraph, Running, Table
from llama_scratch.render.text import percent

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.attribution import AblationCheck, Attribution, Contribution, TokenInfluence

# Maximum number of components and of tokens on one screen.
_PARTS, _TOKENS = 10, 10


def page(why: Attribution) -> Page:
    """Return a page with direct logit attribution, ablation and leave-one-out."""
    parts: list[PageBlock] = [_answer(why), _contributions(why), Paragraph(_sum(why), "dim"), _claims(why)]
    parts += [_influences(why), Paragraph(f"{_left_out(why)} {_gradient(why)}", "dim")]
    return Page("Attribution", tuple(parts), ("attribution",))


def _answer(why: Attribution) -> Running:
    cells = [
        Cell("Why "),
        Cell(why.answer.text, "bold", token=True),
        Cell(f" ({percent(why.answer.probability)}) "),
    ]
    if why.versus:
        cells += [
            Cell("over "),
            Cell(why.versus.text, "bold", token=True),
            Cell(f" ({percent(why.versus.probability)}) "),
        ]
    logit = f": logit difference {why.logit:+.2f}." if why.versus else f": logit {why.logit:.2f}."
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
    return Table(("component", ">logit", ""), tuple(rows), "Direct logit attribution")


def _sum(why: Attribution) -> str:
    what = "the logit difference" if why.versus else "the logit"
    if any(contribution.name == "interventions" for contribution in why.contributions):
        return (
            f"The contributions add up to {what}. 'interventions' is the contribution of changes to the residual "
            "stream itself."
        )
    return (
        f"The contributions add up to {what} up to rounding ({why.remainder:+.1e}). Each is the output of a component, "
        "projected onto the unembedding with the scale of the final norm held constant."
    )


def _claims(why: Attribution) -> Table:
    rows = tuple((Cell(c.contribution.name, hover=_logit(c.contribution)), *_shift(why, c)) for c in why.claims)
    columns = ("component", *(f">{name}" for name in _names(why)))
    return Table(columns, rows, "Zero ablation of the strongest components")


def _logit(contribution: Contribution) -> str:
    return f"{contribution.name}: {contribution.logit:+.4f}"


def _names(why: Attribution) -> list[str]:
    return ["answer", "other"] if why.versus else ["answer"]


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
    # Two answers leave no room for bars on a narrow screen.
    columns = ("token", *(f">{name}" for name in _names(why)), ">grad × input", *([] if why.versus else [""]))
    return Table(columns, rows, "Leave-one-out: prediction without each token")


def _without(why: Attribution, influence: TokenInfluence) -> list[Cell]:
    cells = [Cell("" if influence.without is None else percent(influence.without))]
    if why.versus:
        cells.append(Cell("" if influence.versus_without is None else percent(influence.versus_without)))
    return cells


def _gradient(why: Attribution) -> str:
    of, what = ("(logit difference)", "logit difference") if why.versus else ("logit", "logit")
    return f"grad × input: ∂{of}/∂embedding · embedding, the first-order effect of the token on the {what}."


def _left_out(why: Attribution) -> str:
    tried = sum(influence.without is not None for influence in why.influences)
    if not tried:
        return "Leave-one-out needs a text of at least two tokens."
    if tried < len(why.influences):
        return (
            f"{tried} of {len(why.influences):,} tokens were left out, one at a time, chosen by gradient × input. "
            "The lowest probability of the answer comes first."
        )
    return "Each token was left out once. The lowest probability of the answer comes first."
