"""/ablate, /patch, /steer, /restore: persistent interventions on the network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.pages import effect as effect_pages
from llama_scratch.render.pages import patching
from llama_scratch.repl import answering
from llama_scratch.repl.commands.arguments import first_word, number, two_texts, unquoted, whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under, note, paged
from llama_scratch.repl.session import Session
from llama_scratch.repl.transitions import intervene, rollback_on_interrupt

if TYPE_CHECKING:
    from llama_scratch.microscope.interventions import Intervention

command = commands_under("Interventions")

_AT = re.compile(r"([lL]?\d\S*?)@(\S*)(?:\s+(.*))?", re.DOTALL)


def _put(session: Session, more: Sequence[Intervention]) -> Reply:
    """Add interventions and show their effect on the answer.

    An intervention replaces an earlier one with the same label, because /restore needs unique labels.
    """
    new = {intervention.label: intervention for intervention in more}
    with rollback_on_interrupt(session):
        others = [intervention for intervention in session.state.interventions if intervention.label not in new]
        effect = intervene(session, [*others, *new.values()])
        if effect is None:
            meanings = [intervention.meaning for intervention in new.values()]
            return note(" ".join(meanings), interventions=session.state.labels)
        return paged(session, effect.as_json(), effect_pages.page(effect))


def _listed(session: Session) -> Reply:
    """List the active interventions."""
    on = session.state.interventions
    sentence = "\n".join(f"{i.label}  {i.meaning}" for i in on) or "No interventions are active."
    return note(sentence, interventions=[intervention.as_json() for intervention in on])


def _parts(session: Session, _begun: str) -> Iterable[str]:
    """Complete a part with examples such as L0.H0."""
    return ["L0.H0", "L0.attn", "L0.ffn", "L0"]


@command("ablate", "[PART … [mean]]", complete=_parts)
def _ablate(session: Session, argument: str) -> Reply:
    """Ablate heads (L5.H3), layers or neurons until /restore.

    L5 is a whole layer, L5.attn its attention, L5.ffn its feed-forward network, and L5.N120 a neuron of that network.
    Zero ablation replaces the output with 0; 'mean' at the end replaces it with its mean over the text so far.
    Without PART, lists the active interventions.
    """
    from llama_scratch.microscope.interventions import ablate, mean_ablate
    from llama_scratch.microscope.parts import NetworkPart

    *names, last = argument.split() or [""]
    if not last:
        return _listed(session)
    llama, mean = session.intact, last == "mean"
    parts = [NetworkPart.named(name, llama.args) for name in (names if mean else [*names, last])]
    if not parts:
        raise UsageError("'mean' needs a part before it, as in /ablate L5.H3 mean.")
    with session.screen.progress() as progress:
        more = [mean_ablate(llama, part, session.ids, progress) if mean else ablate(llama, part) for part in parts]
    return _put(session, more)


@command("patch", "[PART@POSITION] TEXT")
def _patch(session: Session, argument: str) -> Reply:
    """Activation patching: causal tracing with TEXT, or one patch.

    Causal tracing patches each activation of TEXT into the current text and maps its effect on the answer: layers down,
    positions across. Both texts need the same number of tokens. A text in double quotes is read as JSON.

    L5@3 TEXT patches one activation until /restore: the residual stream before layer 5 at position 3 (from 0; -1 is
    the last, 'all' is every position). L5.H3@3, L5.attn@3 and L5.ffn@3 patch the output of the head, of attention or of
    the feed-forward network.
    """
    from llama_scratch.microscope.patching import trace

    if matched := _AT.fullmatch(argument):
        return _patch_one(session, matched[1], matched[2], unquoted(matched[3] or ""))
    if not (text := unquoted(argument)):
        raise UsageError("No text was given for /patch. Give another text, as in /patch The capital of Italy is.")
    llama, ids, other = session.llama, session.ids, session.encode(text)
    with session.screen.progress() as progress:
        traced = trace(llama, ids, other, progress)
    return paged(session, traced.as_json(), patching.page(traced))


def _patch_one(session: Session, name: str, position: str, text: str) -> Reply:
    from llama_scratch.microscope.interventions import patch
    from llama_scratch.microscope.parts import NetworkPart

    if not text:
        where = sanitize(f"{name}@{position}")
        raise UsageError(f"No text was given for /patch {where}. Give the text to take the activation from.")
    llama, ids, other = session.intact, session.ids, session.encode(text)
    part = NetworkPart.named(name, llama.args)
    if position == "all":
        if len(other) != len(ids):
            raise UsageError(
                f"The texts have {len(ids)} and {len(other)} tokens. Give texts of the same length for 'all'."
            )
        positions = {i: i for i in range(len(ids))}
    else:
        every = "'all' or " if len(ids) == len(other) else ""
        here = _position(position, len(ids), "This text", every)
        # A negative position counts from the end of each text, because their lengths may differ.
        there = _position(position, len(other), "The other text", every)
        positions = {here: there}
    with session.screen.progress() as progress:
        intervention = patch(llama, part, other, positions, progress)
    return _put(session, [intervention])


def _position(name: str, length: int, what: str, every: str) -> int:
    """Parse a position, counted from the start, or from the end if it is negative."""
    position = int(name) if re.fullmatch(r"-?\d{1,9}", name) else length
    if not -length <= position < length:
        raise UsageError(
            f"{what} has no position '{sanitize(name)}'. Use {every}a number from {-length} to {length - 1}. "
            "Put a text that begins like L5@3 in double quotes."
        )
    return position % length


@command("steer", "LAYER SCALE A | B")
def _steer(session: Session, argument: str) -> Reply:
    """Steer: add SCALE × (activation of A − activation of B).

    The steering vector is added to the residual stream after LAYER, at every token, until /restore. The activations are
    taken at the last token of each text: /steer 12 2 I love it | I hate it. A text in double quotes is read as JSON.
    """
    from llama_scratch.microscope.interventions import steer

    layer, rest = first_word(argument)
    scale, texts = first_word(rest)
    llama = session.intact
    which, factor = whole_number(layer.lstrip("lL"), "a layer", least=0), number(scale, "the scale")
    toward, away = map(session.encode, two_texts(texts, "/steer"))
    with session.screen.progress() as progress:
        direction = steer(llama, which, factor, toward, away, progress)
    return _put(session, [_named(session, direction)])


def _named(session: Session, new: Intervention) -> Intervention:
    """Give a steering vector a unique label.

    Steering vectors add up, so a new one must not replace an earlier one with the same label.
    """
    on = {intervention.label: intervention.meaning for intervention in session.state.interventions}
    names = (new.label, *(f"{new.label}#{n}" for n in range(2, len(on) + 2)))
    return replace(new, label=next(name for name in names if on.get(name, new.meaning) == new.meaning))


def _labels(session: Session, _begun: str) -> Iterable[str]:
    return session.state.labels


@command("restore", "[LABEL]", complete=_labels)
def _restore(session: Session, argument: str) -> Reply:
    """Remove an intervention, or all of them without LABEL.

    LABEL is the label shown in the prompt, such as -L5.H3.
    """
    if not session.state.interventions:
        raise UsageError("No interventions are active. Add one with /ablate, /patch or /steer.")
    left = [change for change in session.state.interventions if argument and change.label != argument]
    if len(left) == len(session.state.interventions):
        raise UsageError(
            f"'{sanitize(argument)}' is not an active intervention. Use one of {', '.join(session.state.labels)}."
        )
    with rollback_on_interrupt(session):
        intervene(session, left)
        if session.screen.interactive and session.now:
            answering.show_answer(session, session.now.prediction)
    return note(
        "All interventions are removed." if not left else f"Still active: {', '.join(session.state.labels)}.",
        interventions=session.state.labels,
    )
