"""Replay a session file and compare every answer with the recorded one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llama_scratch import __version__
from llama_scratch.errors import sanitize
from llama_scratch.render.lines import json_line
from llama_scratch.render.messages import user_message
from llama_scratch.repl.commands import COMMANDS, is_command
from llama_scratch.repl.commands.registry import split
from llama_scratch.repl.conversation import Chat
from llama_scratch.repl.dispatch import respond
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.offers import offer
from llama_scratch.repl.saved_model import shape_differences, versions, weights_sha256
from llama_scratch.repl.session import Session
from llama_scratch.repl.session_file import SessionFile, SessionHeader, ids_of, whole_numbers
from llama_scratch.repl.state import Turn
from llama_scratch.repl.transitions import answer_again, intervene, switch
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import fingerprint_of

if TYPE_CHECKING:
    from llama_scratch.llama import Llama

# Absolute and relative tolerance for numbers. In the same precision, only rounding differs. In another precision, the
# larger tolerance covers the quantization error.
TOLERANCE, BETWEEN_PRECISIONS = 1e-3, 2e-2
# Fields that are not compared: timings; numbers of cached tokens, which depend on live prediction; warnings; and the
# model, which is compared once per session.
_IGNORED = {"timing", "warnings", "model", "path", "precision", "device", "reused_tokens", "new_tokens"}
# Fields of generated text. If it was sampled without a seed, it differs every time.
_GENERATED = {"generated", "text", "ids", "logprobs", "finish_reason"}


@dataclass(frozen=True)
class Difference:
    """A difference between the recording and the replay.

    Args:
        turn: The turn, counted from 1; 0 for the session as a whole.
        input: The turn's line.
        what: The differing value: its path in the answer's JSON object, or a description.
        old: The recorded value.
        new: The value of the replay.
    """

    turn: int
    input: str
    what: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """Describe the difference in one line."""
        where = f"Turn {self.turn}, '{sanitize(self.input)}'" if self.turn else "The session"
        return f"{where}: {sanitize(self.what)}: {_as_text(self.old)} → {_as_text(self.new)}"


@dataclass(frozen=True)
class Report:
    """The result of a replay.

    Args:
        turns: Number of turns in the file.
        compared: Number of turns whose answers were compared.
        differences: The differences found.
        notes: Messages about turns that were not compared and about changed conditions.
    """

    turns: int
    compared: int
    differences: list[Difference]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        report = vars(self) | {"differences": [vars(difference) for difference in self.differences]}
        return report | {"tolerance": TOLERANCE, "tolerance_between_precisions": BETWEEN_PRECISIONS}

    def lines(self) -> list[str]:
        """Return the report as text: one line per difference, the notes and a summary."""
        count = len(self.differences)
        summary = f"{count} difference{'s' if count != 1 else ''}" if count else "no difference"
        return [
            *map(str, self.differences),
            *self.notes,
            f"{self.compared} of {self.turns} answers compared: {summary} (tolerance {TOLERANCE:g}, "
            f"or {BETWEEN_PRECISIONS:g} if the precision differs).",
        ]


def run_again(
    recorded: SessionFile, llama: Llama, open_model: Callable[[str, str, Progress], Llama], console: Console
) -> Report:
    """Replay the lines of a session and compare the answers with the recorded ones.

    Accepted tokens and chat answers are taken from the recording, so that later lines continue from the recorded text.
    Commands that write files, or whose results depend on files, the machine or the user, are skipped: session files are
    untrusted.

    Args:
        recorded: The session file.
        llama: The model.
        open_model: Loads another model, as `Session.open` does.
        console: Shows the progress.

    Returns:
        The result of the comparison.
    """
    header = recorded.header
    session = Session(
        Loading.ended_with(llama),
        console,
        header.settings,
        open_model,
        records_turns=False,
        chat=None if header.system is None else Chat(header.system),
    )
    differences = _model_differences(header, session)
    compared = drawn = 0
    between = header.precision != llama.info.precision
    for number, turn in enumerate(recorded.turns, start=1):
        try:
            new = _repeat(session, turn)
        except Exception as error:  # noqa: BLE001 - any failure of a line counts as a difference
            differences.append(Difference(number, turn.input, "the answer", turn.output, user_message(error)))
            compared += 1
            continue
        if new is None:
            continue
        compared += 1
        old = turn.output
        if _precision(old) and _precision(new):
            between = _precision(old) != _precision(new)
        if _generates(turn) and not session.settings.sampling.greedy and session.settings.sampling.seed is None:
            drawn += 1
            old = {key: value for key, value in old.items() if key not in _GENERATED}
        tolerance = BETWEEN_PRECISIONS if between else TOLERANCE
        differences += [Difference(number, turn.input, *place) for place in compare(old, new, tolerance)]
    notes = _circumstances(header, llama)
    if left_out := len(recorded.turns) - compared:
        turns = f"{left_out} turn{'s' if left_out != 1 else ''}"
        notes.append(f"Not replayed: {turns} with commands that depend on files, the machine or the user.")
    if drawn:
        turns = f"{drawn} turn{'s' if drawn != 1 else ''}"
        notes.append(f"Not compared: the text generated in {turns}, because it was sampled without a seed.")
    return Report(len(recorded.turns), compared, differences, notes)


def _circumstances(header: SessionHeader, llama: Llama) -> list[str]:
    """Describe changed conditions that may explain a difference.

    These are the precision, the device, versions, the tokenizer and the network's shape.
    """
    old = {"precision": header.precision, "device": header.device, "llama-scratch": header.llama_scratch}
    new = {"precision": llama.info.precision, "device": llama.info.device, "llama-scratch": __version__}
    old, new = old | header.versions, new | versions()
    if header.details.tokenizer is not None:
        old["tokenizer"], new["tokenizer"] = header.details.tokenizer, fingerprint_of(llama.tokenizer)
    for name, before, now in shape_differences(header.details, llama):
        old[name], new[name] = before, now
    return [
        f"Recorded with {what} {_as_text(old.get(what))}, replayed with {_as_text(now)}."
        for what, now in new.items()
        if old.get(what) != now
    ]


def _model_differences(header: SessionHeader, session: Session) -> list[Difference]:
    """Compare the session's model with the recorded one: parameters and weights."""
    llama, model = session.llama, header.model
    old: dict[str, Any] = {"parameters": model.parameters}
    new: dict[str, Any] = {"parameters": llama.info.parameters}
    if llama.path is not None:
        with session.screen.progress() as progress:
            new["weights"] = weights_sha256(header.details, llama, progress)
        old["weights"] = model.sha256
    return [Difference(0, "", f"the model's {what}", a, b) for what, a, b in compare(old, new, 0)]


def _repeat(session: Session, turn: Turn) -> dict[str, Any] | None:
    """Replay one turn.

    Returns:
        The JSON object of its answer, or None if the turn cannot be compared.
    """
    ids = ids_of(turn.output)
    if not turn.input and ids and session.now:
        # Only the recording shows which candidate was chosen, or how many tokens an interrupted continuation had.
        before = session.ids
        offer(session, ids[len(before) :] if ids[: len(before)] == before else ())
    if is_command(turn.input):
        command = COMMANDS.get(split(turn.input)[0])
        if command is not None and not command.replayed:
            if command.name == "load":
                _repeat_load(session, turn.output, ids)
            elif ids:  # continue from the text after this command
                session.predict(ids)
            return None
    new = respond(session, turn.input)[0]
    if turn.input and not is_command(turn.input):  # after other lines, generated text is only offered
        _keep_conversation(session, ids, turn.output.get("generated"))
    return new


def _repeat_load(session: Session, output: dict[str, Any], ids: list[int] | None) -> None:
    """Reproduce the effects of /load.

    The lines of the loaded session precede /load in the file, so they have already been replayed. Version 0.1.0 removed
    all interventions on /load, so its answer to /load does not list any.
    """
    path = output.get("model_path")
    if output.get("same_model") is False and isinstance(path, str) and os.path.exists(path):
        switch(session, path, session.llama.info.precision)
    labels = output.get("interventions")
    still_on = [one for one in session.state.interventions if isinstance(labels, list) and one.label in labels]
    if len(still_on) < len(session.state.interventions):
        intervene(session, still_on)
    if session.now and session.ids == ids:
        answer_again(session)
    elif ids:
        session.predict(ids)


def _keep_conversation(session: Session, question: list[int] | None, generated: Any) -> None:
    """In a chat, continue from the recorded answer, even if the replayed one differs."""
    answer = whole_numbers(generated.get("ids")) if isinstance(generated, dict) else None
    if session.state.chat and question and answer and session.ids != [*question, *answer]:
        session.predict([*question, *answer])


def _generates(turn: Turn) -> bool:
    return "generated" in turn.output or turn.output.get("command") == "generate"


def _precision(output: dict[str, Any]) -> str | None:
    """Return the precision in an answer's JSON object, if any."""
    model = output.get("model")
    precision = model.get("precision") if isinstance(model, dict) else None
    return precision if isinstance(precision, str) else None


def compare(old: Any, new: Any, tolerance: float, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Find the differences between two JSON values.

    Keys that are only in `new` are ignored.

    Args:
        old: The recorded value.
        new: The value of the replay.
        tolerance: Absolute and relative tolerance for numbers.
        where: The path of these values in the answer.

    Yields:
        The path, the old value and the new value of each difference.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        interrupted = old.get("finish_reason") == "interrupted"  # its text is shorter than the replayed one
        for key, a in old.items():
            b = new.get(key)
            if key in _IGNORED or (interrupted and key in ("text", "finish_reason")):
                continue
            if interrupted and isinstance(a, list) and isinstance(b, list):
                b = b[: len(a)]
            yield from compare(a, b, tolerance, f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from compare(a, b, tolerance, f"{where}[{i}]")
    elif not _equal(old, new, tolerance):
        yield where, old, new


def _equal(old: Any, new: Any, tolerance: float) -> bool:
    if old == new:
        return True
    if not (isinstance(old, float) or isinstance(new, float)):
        return False
    try:
        return math.isclose(old, new, rel_tol=tolerance, abs_tol=tolerance) or (math.isnan(old) and math.isnan(new))
    except (TypeError, OverflowError):  # not a number, or too large for a float
        return False


def _as_text(value: Any) -> str:
    return sanitize(json_line(value))
