"""Attribution of a logit, on one screen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llama_scratch.render.page import Cell, Finding, Page, PageBlock, Paragraph, Running, Table, written
from llama_scratch.render.text import changes, percent

if TYPE_CHECKING:  # it imports torch
    from llama_scratch.microscope.attribution import AblationCheck, Attribution, Contribution, TokenInfluence

# Maximum number of components and of tokens on one screen.
_PARTS, _TOKENS = 10, 10


def page(why: Attribution) -> Page:
    """Return a page with direct logit attribution, ablation and leave-one-out."""
    parts: list[PageBlock] = [Finding(finding(why)), _answer(why), _contributions(why), Paragraph(_sum(why), "dim")]
    parts += [_claims(why), _influences(why), Paragraph(f"{_left_out(why)} {_gradient(why)}", "dim")]
    return Page("Attribution", tuple(parts), ("attribution",))


def growing(why: Attribution, note: str, rows: int) -> Page:
    """Return a page of the latest table so far, with a line about the progress.

    Args:
        why: The attribution so far.
        note: The progress.
        rows: Maximum number of rows.
    """
    table = _contributions(why) if why.contributions else _influences(why)
    table = replace(table, rows=table.rows[:rows])
    return Page("Attribution", (*([table] if table.rows else []), Paragraph(note, "dim")))


def finding(why: Attribution) -> str:
    """Name the components that the answer depends on, according to ablation.

    These are the decisive component with the largest change and, if it is a different one, the decisive head with the
    largest change. A head is named with the token that it attends to.
    """
    if not why.claims:
        return f"No component was ablated for {_subject(why)}."
    heads = [claim for claim in why.decisive if claim.attended is not None]
    named = list(dict.fromkeys([*why.decisive[:1], *heads[:1]]))
    if not named:
        largest = max(why.claims, key=lambda claim: claim.fall / (why.measure or 1.0))
        return (
            f"No single component of the {len(why.claims)} strongest decides {_subject(why)}: without "
            f"{largest.contribution.name}, which matters most among them, {_after(why, largest)}."
        )
    sentence = f"Without {_described(why, named[0])}, {_after(why, named[0])}"
    for claim in named[1:]:
        rest = percent(claim.after) if why.versus is None else f"{why.measure - claim.fall:+.2f}"
        sentence += f"; without {_described(why, claim)}, to {rest}"
    return f"{sentence}."


def _subject(why: Attribution) -> str:
    answer = f"{written(why.answer.text, token=True)} ({percent(why.answer.probability)})"
    if why.versus is None:
        return answer
    return f"{answer} over {written(why.versus.text, token=True)} ({percent(why.versus.probability)})"


def _described(why: Attribution, claim: AblationCheck) -> str:
    """The name of a component, and for a head the token that it attends to most."""
    name = claim.contribution.name
    if claim.attended is None or claim.attention is None:
        return name
    there = written(why.tokens[claim.attended].text, token=True)
    return f"{name}, a head with {percent(claim.attention)} of its attention on {there}"


def _after(why: Attribution, claim: AblationCheck) -> str:
    return _change(why, claim.after, claim.fall)


def _change(why: Attribution, after: float, fall: float) -> str:
    """Describe the change of the measure: "␣Paris falls from 77.3 % to 14.1 %"."""
    answer = written(why.answer.text, token=True)
    if why.versus is None:
        return f"{answer} {changes(why.answer.probability, after)}"
    verb = "falls" if fall > 0 else "rises"
    other = written(why.versus.text, token=True)
    return f"the logit difference {answer} − {other} {verb} from {why.measure:+.2f} to {why.measure - fall:+.2f}"


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
        (Cell(c.name), Cell(f"{c.logit:+.2f}"), Cell("", bar=c.logit / reach, hover=_logit(why, c)))
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
    rows = tuple(
        (Cell(c.contribution.name, hover=f"{c.contribution.name} ablated: {_after(why, c)}"), *_shift(why, c))
        for c in why.claims
    )
    columns = ("component", *(f">{name}" for name in _names(why)))
    return Table(columns, rows, "Zero ablation of the strongest components")


def _logit(why: Attribution, contribution: Contribution) -> str:
    verb = "raises" if contribution.logit >= 0 else "lowers"
    what = f"the logit of {written(why.answer.text, token=True)}"
    if why.versus:
        what = f"the logit difference {written(why.answer.text, token=True)} − {written(why.versus.text, token=True)}"
    return f"{contribution.name} {verb} {what} by {abs(contribution.logit):.4f}"


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
    """Return the leave-one-out table, largest fall first.

    The last token comes last: without it, the model predicts a different position.
    """
    last = len(why.tokens) - 1
    tried = [influence for influence in why.influences if influence.fall is not None]
    tried.sort(key=lambda influence: (influence.position == last, -(influence.fall or 0.0)))
    if len(tried) > _TOKENS:
        tried = [*tried[: _TOKENS - 1], tried[-1]] if tried[-1].position == last else tried[:_TOKENS]
    reach = max((abs(each.fall or 0.0) for each in tried if each.position < last), default=0.0) or 1.0
    rows = tuple(_influence(why, each, reach) for each in tried or why.influences[:_TOKENS])
    columns = ("token", *(f">{name}" for name in _names(why)), "", ">grad × input")
    return Table(columns, rows, f"Leave-one-out: the fall of the {_measured(why)} without each token")


def _influence(why: Attribution, influence: TokenInfluence, reach: float) -> tuple[Cell, ...]:
    """A row of the leave-one-out table. The last token is marked and has no bar."""
    last = influence.position == len(why.tokens) - 1
    name, fall = written(influence.token.text, token=True), influence.fall
    token = Cell(influence.token.text, token=True, hover=f"position {influence.position}")
    bar = Cell("")
    if last and fall is not None:
        token = Cell(
            f"{name} (last)", said=f"the last token {name}", hover="Without it, the text asks another question"
        )
    elif fall is not None and influence.without is not None:
        said = f"fall of the logit difference {fall:+.2f}" if why.versus else ""
        bar = Cell("", bar=fall / reach, hover=f"Without {name}, {_change(why, influence.without, fall)}", said=said)
    gradient = influence.gradient_x_input
    return (
        token,
        *_without(why, influence),
        bar,
        Cell("", "dim") if gradient is None else Cell(f"{gradient:+.2f}", "dim", hover=f"{gradient:+.4f}"),
    )


def _measured(why: Attribution) -> str:
    return "logit difference" if why.versus else "answer"


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
    which = "Each token was left out once"
    if tried < len(why.influences):
        which = f"{tried} of {len(why.influences):,} tokens were left out, one at a time, chosen by gradient × input"
    return (
        f"{which}. Bars to the right: the {_measured(why)} falls without the token, so the token speaks for it. "
        "Without the last token, the text asks another question."
    )
