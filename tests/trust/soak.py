"""Soak test of the session: seeded random commands, checked against a model.

`State` holds the expected state of the session after each command as plain values. The expected answers come from
weights that are loaded a second time and from new engines without a cache. Every 500th answer is also compared with
a separate process.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from llama_scratch.chat_format import Message
from llama_scratch.download.pypi import pull
from llama_scratch.errors import LlamaScratchError
from llama_scratch.inference.engine import Engine
from llama_scratch.llama import Llama
from llama_scratch.microscope.interventions import Intervention, ablate, changed, mean_ablate, patch, remake, steer
from llama_scratch.microscope.parts import NetworkPart
from llama_scratch.repl import recording, session_file
from llama_scratch.repl.conversation import ANSWER
from llama_scratch.repl.dispatch import respond
from llama_scratch.repl.interrupts import Interrupts
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.offers import offer_next
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Settings
from llama_scratch.sampling import Sampling
from llama_scratch.system.progress import Progress, silent
from tests.helpers.checkpoints import write_meta
from tests.trust.record import write

# Maximum relative L2 distance between the logits of the session and of a fresh engine: rounding in another order.
BOUNDS = {"fp32": 1e-5, "fp16": 1e-5, "bf16": 1e-5, "int8": 5e-2}
# If a text repeats one token, a trained network subtracts large, nearly equal numbers: with or without the cache,
# float32 rounding moves its logits by about 1e-5 from the float64 logits.
REPEATED, REPEATED_BOUND = ", one token repeated", 1e-4
A_PROCESS_EVERY = 500
MOMENTS = 1000  # texts that /undo keeps
WORDS = (
    "the", "nation", "in", "air,", "onto", "stars!", "end", "of", "it?", "No:", "he", "said", "(to", "her)", "42",
    "caf\u00e9", "\u65e5\u672c", "\U0001f389", "//x",
)  # fmt: skip


class FoundError(Exception):
    """The session differs from its model."""


class RefusedError(Exception):
    """According to the model of the session, the command must fail."""


# --- The model of a session -------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """An intervention on the reference network.

    `line` is the command that creates it, or None if the command also depends on the text.
    """

    made: Intervention
    line: str | None

    @property
    def label(self) -> str:
        """The session's name for the intervention."""
        return self.made.label


@dataclass(frozen=True)
class Said:
    """A text, the tokens that Enter appends, and the settings of its answer.

    If `past`, the text was loaded from a file and is not answered yet.
    """

    ids: tuple[int, ...]
    offered: tuple[int, ...]
    top: int
    precision: str
    on: tuple[Change, ...]
    past: bool = False


@dataclass(frozen=True)
class Talk:
    """A chat: the system prompt, and each question as messages and as token ids."""

    system: str = ""
    asked: tuple[tuple[tuple[Message, ...], tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class State:
    """The expected state of a session."""

    source: str
    precision: str
    top: int = 5
    generate: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    live: bool = True
    special: bool = False
    texts: tuple[Said, ...] = ()
    on: tuple[Change, ...] = ()
    chat: Talk | None = None

    @property
    def now(self) -> Said:
        """The newest text. Raises `RefusedError` if there are no texts."""
        if not self.texts:
            raise RefusedError
        return self.texts[-1]


class Reference:
    """The same models, loaded a second time and run on new engines without a cache."""

    def __init__(self, context: int) -> None:
        self.context = context
        self._llamas: dict[tuple[str, str], Llama] = {}
        self._last: tuple[Any, Tensor] | None = None

    def llama(self, state: State, precision: str | None = None) -> Llama:
        """Return the model without interventions."""
        key = state.source, precision or state.precision
        if key not in self._llamas:
            self._llamas[key] = Llama.load(key[0], precision=key[1], context=self.context)
            self._llamas[key].prepare()
        return self._llamas[key]

    def engine(self, state: State, precision: str | None = None, on: Sequence[Change] | None = None) -> Engine:
        """Create an engine with the interventions `on`, by default those in `state`."""
        llama = self.llama(state, precision)
        llama.engine = Engine(llama.engine.model, llama.context, llama.engine.packing)
        return changed(llama, [change.made for change in (state.on if on is None else on)]).engine

    def logits(self, state: State, ids: Sequence[int], said: Said | None = None) -> Tensor:
        """Logits of the next token, (vocab_size,).

        Args:
            state: The model, and the precision and interventions unless `said` is given.
            ids: The text.
            said: An answer whose precision and interventions are used instead.

        Raises:
            RefusedError: If the text is empty or longer than the context.
        """
        precision, on = (said.precision, said.on) if said else (state.precision, state.on)
        key = (state.source, precision, tuple(map(id, on)), tuple(ids))
        if self._last is None or self._last[0] != key:
            if not 0 < len(ids) <= self.context:
                raise RefusedError
            self._last = key, self.engine(state, precision, on).next_logits(list(ids)).values
        return self._last[1]


def likely(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Sampling probabilities from the definitions of the filters, (vocab_size,)."""
    p = torch.softmax((logits.double() - logits.max().double()) / temperature, -1)
    order = p.sort(descending=True).indices
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    if top_p < 1:
        together = 0.0
        for place, token in enumerate(order.tolist()):
            if place and together >= top_p:
                p[token] = 0
            together += float(p[token]) if p[token] else 0.0
        p /= p.sum()
    return torch.where(p >= min_p * p.max(), p, 0.0)


# --- The soak ---------------------------------------------------------------------------------

After = Callable[[State, dict[str, Any]], list[State]]
"""State before and JSON output of a command → the states that it passes through; the last one is the result."""


class Soak:
    """One session and its model. Raises `FoundError` at the first difference.

    Args:
        folder: A folder for files.
        source: Path of the model.
        other: Path of another model.
        seed: Random seed.
        context: Context length in tokens.
        interactive: Whether the session behaves as on a terminal.
        generate: Tokens that each answer generates.
        precisions: The precisions to switch between.
    """

    def __init__(
        self,
        folder: Path,
        source: str,
        other: str,
        seed: int,
        *,
        context: int,
        interactive: bool,
        generate: int = 0,
        precisions: Sequence[str] = ("fp32", "fp16", "bf16", "int8"),
    ) -> None:
        self.folder, self.other, self.context, self.precisions = folder, other, context, precisions
        self.random = random.Random(seed)
        self.reference = Reference(context)
        self.state = State(source, "fp32", generate=generate)
        self.saved: dict[str, tuple[State, str]] = {}
        self.kinds: Counter[str] = Counter()
        self.compared: Counter[str] = Counter()
        self.worst: dict[str, float] = {}
        self.lines: list[str] = []
        llama = self._open(source, "fp32", silent)
        llama.prepare()
        console = Console(file=io.StringIO(), width=80)
        self.session = Session(
            Loading.ended_with(llama), console, Settings(5, generate, Sampling()), self._open, interactive=interactive
        )
        self.home = source

    def _open(self, source: str, precision: str, progress: Progress) -> Llama:
        return Llama.load(source, precision=precision, context=self.context, progress=progress)

    # --- The model of a session ---

    def tokens(self, state: State, text: str) -> tuple[int, ...]:
        """Encode a prompt."""
        return tuple(self.reference.llama(state).encode(text, special=state.special))

    def text(self, state: State, ids: Sequence[int]) -> str:
        """Decode token ids without the beginning-of-text token."""
        tokenizer = self.reference.llama(state).tokenizer
        return tokenizer.decode(ids[1:] if ids and ids[0] == tokenizer.bos_id else ids)

    def best(self, state: State, ids: Sequence[int], taken: int | None, rank: int = 1) -> int:
        """The token with a given rank, or the session's choice if equal up to rounding."""
        logits = self.reference.logits(state, ids)
        best = logits.topk(rank)
        slack = BOUNDS[state.precision] * float(logits.norm())
        if taken is not None and abs(float(logits[taken] - best.values[-1])) <= slack:
            return taken
        return int(best.indices[-1])

    def answered(self, state: State, ids: Sequence[int], offer: bool = True) -> State:
        """Append an answered text to a state."""
        now = self.session.now  # its choice between equal logits
        taken = now.prediction.next.id if now and now.ids == list(ids) else None
        offered = (self.best(state, ids, taken),)
        said = Said(tuple(ids), offered if offer else (), state.top, state.precision, state.on)
        return replace(state, texts=(*state.texts, said)[-MOMENTS:])

    def offering(self, state: State, ids: Sequence[int]) -> State:
        """Let Enter append `ids`."""
        if not ids or not state.texts:
            return state
        return replace(state, texts=(*state.texts[:-1], replace(state.now, offered=tuple(ids))))

    def continued(self, state: State, count: int, new: Sequence[int], reason: str) -> None:
        """Check that the network and the sampling can produce a continuation.

        Args:
            state: The state before the continuation.
            count: The requested number of tokens.
            new: The generated tokens.
            reason: The finish reason.

        Raises:
            FoundError: If the number of tokens or one of the tokens is wrong.
        """
        ids, options = state.now.ids, state.sampling
        stops = self.reference.llama(state).tokenizer.stop_ids
        room = min(count, self.context - len(ids))
        if len(new) > room or (reason != "interrupted" and (len(new) < room) != (reason == "stop")):
            raise FoundError(f"{len(new)} of {room} tokens were generated, with finish reason {reason}")
        if not new and reason != "stop":
            return
        logits = self.reference.engine(state).all_logits([*ids, *new])[len(ids) - 1 :]
        generator = torch.Generator().manual_seed(options.seed or 0)
        slack = BOUNDS[state.precision]
        for place, row in enumerate(logits[: len(new) + (reason == "stop")]):
            wanted = [new[place]] if place < len(new) else sorted(stops)
            if options.temperature == 0:
                scores, least = row, float(row.max()) - slack * float(row.norm())
            else:
                scores = likely(row, options.temperature, options.top_k, options.top_p, options.min_p)
                least = 1e-300
                if options.seed is not None and state.precision == "fp32":  # the same draw as an exponential race
                    scores = scores / torch.empty_like(scores).exponential_(1, generator=generator)
                    least = float(scores.max()) * (1 - 1e-3 - 1e-5 / options.temperature * float(row.norm()))
            if max(float(scores[id]) for id in wanted) < least:
                raise FoundError(f"token {place} of the continuation cannot be {wanted[:3]}")

    def known(self, state: State, talk: Talk, ids: Sequence[int]) -> tuple[Message, ...]:
        """The messages of the conversation in a text."""
        tokenizer = self.reference.llama(state).tokenizer
        for messages, asked in reversed(talk.asked):
            if len(ids) > len(asked) and tuple(ids[: len(asked)]) == asked:
                answer = list(ids[len(asked) :])
                end = next((i for i, id in enumerate(answer) if id in tokenizer.stop_ids), len(answer))
                return (*messages, Message("assistant", tokenizer.decode(answer[:end])))
            if tuple(ids) == asked:
                return messages[:-1]
        return (Message("system", talk.system),) if talk.system else ()

    # --- The effect of each command ---

    def asks(self, ids: Callable[[State], Sequence[int]]) -> After:
        """Answer a text and, with --generate, continue it."""

        def after(state: State, output: dict[str, Any]) -> list[State]:
            asked = tuple(ids(state))
            states = [self.answered(state, asked)]
            if state.generate:
                states.append(self._went_on(states[-1], state.generate, output.get("generated")))
            return states

        return after

    def _went_on(self, state: State, count: int, generated: Any) -> State:
        """Offer a continuation, or the session's partial one if it was interrupted."""
        if generated is None:
            now = self.session.now
            if not now or tuple(now.ids) != state.now.ids or now.offered == state.now.offered:
                return state
            generated = {"ids": now.offered, "finish_reason": "interrupted"}
        self.continued(state, count, generated["ids"], generated["finish_reason"])
        return self.offering(state, generated["ids"])

    def says(self, line: str) -> After:
        """Enter a line: a prompt, or a message if a chat is on."""

        def after(state: State, output: dict[str, Any]) -> list[State]:
            if state.chat is None:
                return self.asks(lambda state: self.tokens(state, text))(state, output)
            before = self.known(state, state.chat, state.texts[-1].ids if state.texts else ())
            messages = (*before, Message("user", text))
            ids = tuple(self.reference.llama(state).encode_chat(messages))
            if len(ids) >= self.context:
                raise RefusedError
            first = self.answered(state, ids)
            known = replace(first, chat=replace(state.chat, asked=(*state.chat.asked, (messages, ids))))
            if "generated" not in output:  # it was interrupted: accept the partial answer
                return [first, known, *self._interrupted(known)]
            generated = output["generated"]
            states = [first, known, self._went_on(known, state.generate or ANSWER, generated)]
            if generated["ids"]:
                states.append(self.answered(states[-1], [*ids, *generated["ids"]]))
            if generated["finish_reason"] == "stop":
                now = replace(states[-1].now, offered=())
                states.append(replace(states[-1], texts=(*states[-1].texts[:-1], now)))
            return states

        text = line.removeprefix("/") if line.startswith("//") else line
        return after

    def _interrupted(self, state: State) -> list[State]:
        """Possible states after an interrupted chat answer.

        The partial answer is offered, or is already a text.
        """
        moments = self.session.state.snapshots
        found = []
        for moment in moments[-2:]:
            if tuple(moment.ids) == state.now.ids and len(moment.offered) > 1:
                self.continued(state, len(moment.offered), moment.offered, "interrupted")
                found.append(self.offering(state, moment.offered))
        if found and tuple(moments[-1].ids) == (*found[-1].now.ids, *found[-1].now.offered):
            found.append(self.answered(found[-1], moments[-1].ids))
        return found

    def same(self, state: State, output: dict[str, Any]) -> list[State]:
        """A command that changes nothing."""
        if output.get("command") == "context" and output["tokens"] != len(state.texts and state.now.ids):
            raise FoundError("/context reports a wrong number of tokens")
        return [state]

    def view(self, state: State, output: dict[str, Any]) -> list[State]:
        """A command that needs a text and changes nothing."""
        _ = state.now
        return [state]

    def must_refuse(self, _state: State, _output: dict[str, Any]) -> list[State]:
        """A command that must fail."""
        raise RefusedError

    def setting(self, **changes: Any) -> After:
        """Change settings of the session."""
        return lambda state, _: [replace(state, **changes)]

    def drawing(self, **changes: Any) -> After:
        """Change sampling parameters."""
        return lambda state, _: [replace(state, sampling=replace(state.sampling, **changes))]

    def intervening(self, on: Callable[[State], Sequence[Change]]) -> After:
        """Set the interventions and answer the text again."""

        def after(state: State, _: dict[str, Any]) -> list[State]:
            found = replace(state, on=tuple(on(state)))
            if state.texts:
                found = self.answered(found, state.now.ids, offer=bool(state.now.offered))
            return [found]

        return after

    def putting(self, made: Callable[[State], Intervention], line: str | None) -> After:
        """Add an intervention, replacing one with the same label."""

        def on(state: State) -> Sequence[Change]:
            new = Change(made(state), line)
            return [*(change for change in state.on if change.label != new.label), new]

        return self.intervening(on)

    def undone(self, state: State, _: dict[str, Any]) -> list[State]:
        """/undo."""
        if len(state.texts) < 2:
            raise RefusedError
        before = state.texts[-2]
        if before.past:  # /undo answers it
            before = replace(before, precision=state.precision, past=False)
        return [replace(state, texts=(*state.texts[:-2], before), on=before.on)]

    def switched(self, source: str | None, precision: str | None) -> After:
        """Switch to another model or precision."""

        def after(state: State, _: dict[str, Any]) -> list[State]:
            new = replace(state, source=source or state.source, precision=precision or state.precision)
            ids: Sequence[int] = state.now.ids if state.texts else ()
            if source is not None:
                text = self.text(state, ids)
                new = replace(new, on=(), chat=None, texts=())
                ids = self.tokens(new, text) if ids else ()
            return [self.answered(new, ids, offer=bool(state.now.offered)) if ids else new]

        return after

    def loaded(self, path: str) -> After:
        """/load."""

        def after(state: State, _: dict[str, Any]) -> list[State]:
            then, text = self.saved[path]
            new = replace(then, source=state.source, precision=state.precision)
            if then.source != state.source:
                new = replace(new, on=(), texts=(), chat=None)
                ids = self.tokens(new, text) if text else ()
                return [self.answered(new, ids) if ids else new]
            again: dict[int, Change] = {}  # created once each, with the network in this precision

            def on(changes: Sequence[Change]) -> tuple[Change, ...]:
                for change in changes:
                    if id(change) not in again:
                        again[id(change)] = self._remade(new, change)
                return tuple(again[id(change)] for change in changes)

            texts = [replace(said, on=on(said.on), past=True) for said in then.texts]
            for now in texts[-1:]:
                texts[-1] = replace(now, top=new.top, precision=new.precision, on=on(then.on), past=False)
            return [replace(new, texts=tuple(texts), on=on(then.on))]

        return after

    def _remade(self, state: State, change: Change) -> Change:
        assert change.made.recipe
        _ = self.reference.engine(state)
        made = remake(self.reference.llama(state), change.made.recipe)
        return replace(change, made=replace(made, label=change.label))

    def generates(self, count: int) -> After:
        """/generate."""

        def after(state: State, output: dict[str, Any]) -> list[State]:
            _ = state.now
            return [self._went_on(state, count, output or None)]

        return after

    # --- Random commands ---

    def phrase(self, most: int = 8) -> str:
        """Up to `most` random words."""
        return " ".join(self.random.choices(WORDS, k=self.random.randint(1, most)))

    def command(self) -> tuple[str, str, After]:
        """Choose a random command: its kind, its line and its effect."""
        state, chance = self.state, self.random
        llama = self.reference.llama(state)
        layer, head = chance.randrange(llama.args.n_layers), chance.randrange(llama.args.n_heads)
        kind = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if kind == "chat" and not chance.randrange(2):
            kind = "system"
        if state.precision != "fp32" and not chance.randrange(12):
            return "precision", "/precision fp32", self.switched(None, "fp32")
        if state.source != self.home and not chance.randrange(12):
            return "model", f"/model {self.home}", self.switched(self.home, None)
        if state.chat and not chance.randrange(6):
            return "chat", "/chat off", self.setting(chat=None)
        match kind:
            case "prompt":
                line = self.phrase()
                return kind, line, self.says(line)
            case "special":
                on = not state.special
                return kind, f"/special {'on' if on else 'off'}", self.setting(special=on)
            case "named":  # names of special tokens
                line = chance.choice(["<|begin_of_text|>", "<|eot_id|>x<|end_of_text|>", "a<|im_end|>"])
                return kind, line, self.says(line)
            case "full":  # fill the context, or exceed it
                n = self.context - (llama.tokenizer.bos_id is not None) + chance.choice([-2, -1, 0, 0, 1, 5000])
                return kind, "7" * n, self.says("7" * n)
            case "enter":
                return kind, "", self.asks(lambda state: [*state.now.ids, *state.now.offered])
            case "force":
                id = chance.randrange(llama.args.vocab_size)
                return kind, f"/force #{id}", self.asks(lambda state: [*state.now.ids, id])
            case "choose":
                return kind, "\x00", self._next_candidate
            case "undo":
                return kind, "/undo", self.undone
            case "generate":
                n = chance.choice([1, 2, 5, 9, 20])
                return kind, f"/generate {n}", self.generates(n)
            case "clear":
                return kind, "/clear", self.setting(texts=())
            case "top":
                small = llama.args.vocab_size < 1000  # a table of a large vocabulary takes a minute to draw
                n = chance.choice([1, 2, 5, 7, 40, 100_000 if small else 41])
                return kind, f"/top {n}", self.setting(top=n)
            case "live":
                on = not state.live
                return kind, f"/live {'on' if on else 'off'}", self.setting(live=on)
            case "temperature":
                t = chance.choice([0.0, 1e-9, 0.3, 0.7, 1.0, 1.0, 1.5, 1e9])
                return kind, f"/temperature {t}", self.drawing(temperature=t)
            case "top-k":
                k = chance.choice([0, 1, 3, 40, 10**30])
                return kind, f"/top-k {k}", self.drawing(top_k=k)
            case "top-p":
                p = chance.choice([0.0, 0.1, 0.5, 0.95, 1.0])
                return kind, f"/top-p {p}", self.drawing(top_p=p)
            case "min-p":
                p = chance.choice([0.0, 0.05, 0.5, 1.0])
                return kind, f"/min-p {p}", self.drawing(min_p=p)
            case "seed":
                seed = chance.choice([None, 0, 1, 2**63 - 1, chance.randrange(10**6)])
                return kind, f"/seed {'off' if seed is None else seed}", self.drawing(seed=seed)
            case "greedy":
                return kind, "/greedy", self.drawing(temperature=0.0)
            case "precision":
                precision = chance.choice(self.precisions)
                return kind, f"/precision {precision}", self.switched(None, precision)
            case "model":
                source = chance.choice([self.home, self.other])
                return kind, f"/model {source}", self.switched(source, None)
            case "ablate":
                part = NetworkPart.named(
                    chance.choice([f"L{layer}.H{head}", f"L{layer}.attn", f"L{layer}.N{head}"]), llama.args
                )
                line = f"/ablate {part.name}"
                return kind, line, self.putting(lambda state: ablate(self.reference.llama(state), part), line)
            case "mean":
                part = NetworkPart.named(chance.choice([f"L{layer}.H{head}", f"L{layer}.ffn"]), llama.args)
                return kind, f"/ablate {part.name} mean", self.putting(lambda state: self._mean(state, part), None)
            case "patch":
                return self._patch_command(
                    NetworkPart.named(chance.choice([f"L{layer}", f"L{layer}.H{head}"]), llama.args)
                )
            case "steer":
                return self._steer_command(layer, chance.choice([-1.5, 0.0, 0.5, 2.0]))
            case "restore":
                label = chance.choice([change.label for change in state.on]) if state.on and chance.randrange(3) else ""
                return kind, f"/restore {label}".strip(), self._restored(label)
            case "chat":
                talk = state.chat or Talk()
                return kind, "/chat on", self.setting(chat=talk)
            case "system":
                text = self.phrase(3)
                return kind, f"/system {text}", self.setting(chat=Talk(text), texts=())
            case "tree":
                path = chance.choice(["1", "2.1", "1.3.2"])
                return kind, f"/tree 2x1 {path}", lambda state, _: self._walked(state, path)
            case "back":
                return kind, "/tree 2x2 ..", self.undone
            case "save":
                return kind, f"/save {self.folder}/{chance.randrange(4)}.session", self.same
            case "load":
                path = chance.choice(sorted(self.saved)) if self.saved else ""
                return kind, f"/load {path}".strip(), self.loaded(path) if path else self.must_refuse
            case "file":
                page = self.folder / f"x{chance.choice(['.json', '.md', '.html', '.svg'])}"
                page.unlink(missing_ok=True)
                return kind, f"/export {page}", self.same
            case "error":
                return kind, chance.choice(ERRORS), self.must_refuse
            case "info":
                return kind, chance.choice(NOTES), self.same
            case _:
                line = chance.choice(VIEWS).replace("H@", f"H{head}").replace("@", str(layer))
                return kind, line, self.view

    def _next_candidate(self, state: State, _: dict[str, Any]) -> list[State]:
        """Shift-Tab."""
        if not state.texts or not self.session.now:
            return [state]
        top = [candidate.id for candidate in self.session.now.prediction.top]  # compared with a fresh engine's
        now = state.now.offered
        place = top.index(now[0]) + 1 if len(now) == 1 and now[0] in top else 0
        return [self.offering(state, [top[place % len(top)]])]

    def _mean(self, state: State, part: NetworkPart) -> Intervention:
        _ = self.reference.engine(state)
        return mean_ablate(self.reference.llama(state), part, list(state.now.ids))

    def _patch_command(self, part: NetworkPart) -> tuple[str, str, After]:
        position, text = self.random.choice([0, 1, 2, -1]), self.phrase(3)

        def made(state: State) -> Intervention:
            ids, other = state.now.ids, self.tokens(state, text)
            if not all(-len(found) <= position < len(found) for found in (ids, other)) or len(other) > self.context:
                raise RefusedError
            where = {position % len(ids): position % len(other)}
            return patch(self.reference.llama(state), part, list(other), where)

        return "patch", f"/patch {part.name}@{position} {text}", self.putting(made, None)

    def _steer_command(self, layer: int, scale: float) -> tuple[str, str, After]:
        toward, away = self.phrase(2), self.phrase(2)
        line = f"/steer {layer} {scale} {toward} | {away}"

        def made(state: State) -> Intervention:
            first, second = (list(self.tokens(state, text)) for text in (toward, away))
            found = steer(self.reference.llama(state), layer, scale, first, second)
            on = {change.label: change.made.meaning for change in state.on}
            names = [found.label, *(f"{found.label}#{n}" for n in range(2, 99))]
            return replace(found, label=next(n for n in names if on.get(n, found.meaning) == found.meaning))

        return "steer", line, self.putting(made, line)

    def _restored(self, label: str) -> After:
        def on(state: State) -> Sequence[Change]:
            if not state.on:
                raise RefusedError
            return [change for change in state.on if label and change.label != label]

        return self.intervening(on)

    def _walked(self, state: State, path: str) -> list[State]:
        ids = list(state.now.ids)
        stops = self.reference.llama(state).tokenizer.stop_ids
        now = self.session.now
        taken = now.ids[len(ids) :] if now and now.ids[: len(ids)] == ids else []
        for step, rank in enumerate(map(int, path.split("."))):
            if step and ids[-1] in stops:
                raise RefusedError
            ids.append(self.best(state, ids, taken[step] if step < len(taken) else None, rank))
        return [self.answered(state, ids)]

    # --- One command ---

    def step(self, line_of: tuple[str, str, After] | None = None, interrupt: int | None = None) -> None:
        """Run a command and compare the session with its model.

        Args:
            line_of: Kind, line and effect of the command; random by default.
            interrupt: Cancel the command after this many function calls.

        Raises:
            FoundError: If they differ.
        """
        kind, line, after = line_of or self.command()
        self.kinds[kind] += 1
        self.lines.append(line)
        before, output, refused, cancelled = self.state, {}, "", False
        hook = _Hook()
        try:
            with _interrupted(hook, interrupt):
                output = self._take(line)
        except LlamaScratchError as error:
            refused = str(error)
            if not refused.isprintable():
                raise FoundError(f"not printable: {refused!r}") from error
        except KeyboardInterrupt:
            cancelled = True
        if hook.fired:
            self.kinds["interrupted"] += 1
        try:
            states = after(before, output)
        except (RefusedError, LlamaScratchError):
            if not refused and not cancelled:
                raise FoundError("it was answered, expected an error") from None
            states = [before]
        else:
            if refused and not self._may_refuse(kind, refused):
                raise FoundError(f"it failed: {refused}")
            if refused:
                states = [before]
        if cancelled or hook.fired:
            self._settle([before, *states])
        else:
            self.state = states[-1]
            self._equal()
        self._keep_saved(kind, line, refused or cancelled)
        self._compare()

    def _may_refuse(self, kind: str, sentence: str) -> bool:
        """Whether the error depends on sizes that the model of the session does not track."""
        near_the_end = bool(self.state.texts) and len(self.state.now.ids) > self.context - 8
        return (
            (kind == "view" and near_the_end and sentence.startswith("The prompt has"))
            or (kind == "save" and sentence.startswith("The session takes"))
            or sentence.startswith("With its interventions the network")
        )

    def _take(self, line: str) -> dict[str, Any]:
        if line == "\x00":
            offer_next(self.session)
            return {}
        output, reply = respond(self.session, line)
        json.dumps(output, allow_nan=False)
        if reply and reply.view is not None:
            self.session.screen.show(reply.view)
        if len(self.session.screen.views) > 200:  # this test does not check the screen's memory
            self.session.screen.views = self.session.screen.views[-20:]
        self.session.screen.console.file.seek(0)
        self.session.screen.console.file.truncate()
        return output

    def _keep_saved(self, kind: str, line: str, failed: object) -> None:
        path = line.removeprefix("/save ")
        if kind == "save" and Path(path).exists() and not failed:
            text = self.text(self.state, self.state.now.ids) if self.state.texts else ""
            self.saved[path] = self.state, text

    def _settle(self, states: Sequence[State]) -> None:
        """After an interrupt: require that the session is in one of these states."""
        wrong = []
        for state in reversed(states):
            self.state = state
            try:
                return self._equal()
            except FoundError as error:
                wrong.append(str(error))
        raise FoundError(f"after an interrupt it is in none of the expected states: {' / '.join(wrong)}")

    def _equal(self) -> None:
        """Compare the session with its model.

        Compares the two newest texts, and every 100th time all of them.
        """
        state, session = self.state, self.session
        settings, llama = session.settings, session.llama
        checks: dict[str, tuple[Any, Any]] = {
            "top": (settings.top, state.top),
            "generate": (settings.generate, state.generate),
            "sampling": (settings.sampling, state.sampling),
            "live": (settings.live, state.live),
            "special": (settings.special, state.special),
            "model": (str(llama.path), state.source),
            "precision": (llama.info.precision, state.precision),
            "interventions": (session.state.labels, [change.label for change in state.on]),
            "chat": (session.state.chat and session.state.chat.system, state.chat and state.chat.system),
            "texts": (len(session.state.texts), len(state.texts)),
        }
        last = len(state.texts) if self.kinds.total() % 100 == 0 else 2
        for n, (moment, said) in enumerate(zip(session.state.texts[-last:], state.texts[-last:], strict=False)):
            checks[f"text {n}"] = tuple(moment.ids), said.ids
            checks[f"offer {n}"] = tuple(moment.offered or ()), said.offered
            on = [intervention.label for intervention in moment.interventions]
            checks[f"interventions {n}"] = on, [change.label for change in said.on]
        for what, (found, expected) in checks.items():
            if found != expected:
                raise FoundError(f"{what}: {str(found)[:300]}, expected {str(expected)[:300]}")

    # --- Answers ---

    def _compare(self) -> None:
        """Compare the answer with a fresh engine.

        Half of the time also compares the logits of the session's engine.
        """
        session, state = self.session, self.state
        if not session.now:
            return
        said, prediction = state.now, session.now.prediction
        logits = self.reference.logits(state, said.ids, said)
        slack = BOUNDS[said.precision] * float(logits.norm())
        logprobs = logits.double().log_softmax(-1)
        best = logprobs.topk(min(said.top, logits.numel())).values.tolist()
        if len(prediction.top) != len(best) or prediction.next != prediction.top[0]:
            raise FoundError(f"{len(prediction.top)} candidates, expected {len(best)}")
        for candidate, expected in zip(prediction.top, best, strict=True):
            for value in (expected, float(logprobs[candidate.id])):
                if not abs(candidate.logprob - value) <= slack:
                    raise FoundError(f"candidate {candidate.id}: {candidate.logprob}, but {value} from a fresh engine")
        self.compared["answers"] += 1
        if self.random.randrange(2):
            found = session.llama.engine.next_logits(list(said.ids)).values
            fresh = self.reference.logits(state, said.ids)
            repeated = Counter(said.ids).most_common(1)[0][1] > 20
            self._near("engine", state.precision, found, fresh, repeated=repeated)

    def _near(self, what: str, precision: str, found: Tensor, fresh: Tensor, *, repeated: bool) -> None:
        difference = float((found - fresh).norm() / fresh.norm())
        kind = precision + REPEATED if repeated and BOUNDS[precision] < REPEATED_BOUND else precision
        self.worst[kind] = max(self.worst.get(kind, 0.0), difference)
        self.compared[what] += 1
        if not difference <= (BOUNDS[precision] if kind == precision else REPEATED_BOUND):
            raise FoundError(f"{what}: logits in {precision} differ by {difference:.2e}")
        if precision == "fp32":
            margin = float(fresh.max() - fresh[int(found.argmax())])
            if margin > 2 * BOUNDS[precision] * float(fresh.norm()):
                raise FoundError(f"{what}: the most likely token differs")

    def process(self) -> None:
        """Repeat the answer in a separate process.

        The process loads the session file and sets the interventions again.
        """
        for change in [change for change in self.state.on if change.line is None]:
            self.step(("restore", f"/restore {change.label}", self._restored(change.label)))
        if self.state.chat:
            self.step(("chat", "/chat off", self.setting(chat=None)))
        if not self.state.texts or not self.session.state.turns:
            self.step(("prompt", "the nation", self.says("the nation")))
        state, session = self.state, self.session
        path = self.folder / "process.session"
        recorded = recording.record(session)
        session_file.save(replace(recorded, turns=recorded.turns[-1:]), path)
        lines = [f"/precision {state.precision}", f"/load {path}", *(change.line or "" for change in state.on)]
        options = ["--model-dir", state.source, "--precision", "fp32", "--context", str(self.context)]
        ran = subprocess.run(
            [sys.executable, "-m", "llama_scratch", *options, "--commands", "--json", "--quiet"],
            input="\n".join(lines) + "\n",
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        if ran.returncode or ran.stderr:
            raise FoundError(f"the process ended with {ran.returncode}: {ran.stderr[-500:]}")
        answer = json.loads(ran.stdout.splitlines()[-1])
        logits = self.reference.logits(state, state.now.ids)
        logprobs, slack = logits.double().log_softmax(-1), BOUNDS[state.precision] * float(logits.norm())
        best = answer["after" if state.on else "next"]
        if (
            abs(best["logprob"] - float(logprobs[best["id"]])) > slack
            or best["logprob"] < float(logprobs.max()) - slack
        ):
            raise FoundError(f"a fresh process predicts {best}")
        if not state.on and [token["id"] for token in answer["tokens"]] != list(state.now.ids):
            raise FoundError("a fresh process has another text")
        self.compared["processes"] += 1

    def run(self, commands: int, tell: Callable[[int], None] = lambda _: None) -> None:
        """Run random commands.

        Args:
            commands: Number of commands.
            tell: Called with the number of completed commands.

        Raises:
            FoundError: At the first difference, with the last lines before it.
        """
        try:
            for n in range(1, commands + 1):
                # Commands make between 1 and 10,000 function calls.
                moment = int(10 ** self.random.uniform(0, 4)) if self.random.random() < 0.03 else None
                self.step(interrupt=moment)
                if n % A_PROCESS_EVERY == 0:
                    self.process()
                tell(n)
            self.kinds["end"] = 100 - self.kinds.total() % 100
            self._equal()  # all texts
            del self.kinds["end"]
        except Exception as error:
            lines = "\n".join(line[:200] for line in self.lines[-15:])
            raise FoundError(
                f"{type(error).__name__}: {error}\nafter {len(self.lines)} lines, the last:\n{lines}"
            ) from error


WEIGHTS = {
    "prompt": 14, "named": 1, "full": 2, "enter": 10, "force": 6, "choose": 4, "undo": 12, "generate": 8, "clear": 0.3,
    "top": 2, "live": 1, "special": 1, "temperature": 2, "top-k": 1, "top-p": 1, "min-p": 1, "seed": 2, "greedy": 2,
    "precision": 0.7, "model": 0.3, "ablate": 2, "mean": 1, "patch": 1, "steer": 1.5, "restore": 5, "chat": 1,
    "tree": 1, "back": 0.5, "save": 0.7, "load": 0.7, "file": 0.2, "error": 6, "info": 3, "view": 12,
}  # fmt: skip
VIEWS = (
    "/tokens", "/surprisal", "/tree 2x2", "/choices a | b | to", "/lens", "/lens ranks 0",
    "/attention", "/attention L@", "/attention L@.H@", "/why", "/why #5 vs #6", "/neurons @ 3", "/step", "/step next",
    "/step into", "/rope", "/kv", "/kv @", "/numerics fp16", "/compare fp16",
)  # fmt: skip
NOTES = (
    "/help", "/help lens", "/arch 64", "/source rope", "/source", "/memory", "/info", "/history 3", "/top", "/seed",
    "/precision", "/model", "/ablate", "/live", "/special", "/temperature", "/tokens he", "/context",
    "/diff he | her", "/surprisal the nation", "/step end",
)  # fmt: skip
ERRORS = (
    "/nothing", "/top 0", "/top x", "/temperature nan", "/temperature -1", "/temperature inf", "/top-p 2",
    "/min-p -0.1",
    "/seed -1", "/seed 18446744073709551615", "/generate 0", "/generate x", "/force", "/force #99999999", "/force \"\"",
    "/ablate L99", "/ablate L0.H99", "/ablate mean", "/patch L0@99999 x", "/steer 99 1 a | b", "/steer 0 1e308 a",
    "/steer 0 nan a | b", "/restore nothing", "/load /nowhere/at/all", "/save /nowhere/at/all", "/model /nowhere",
    "/precision fp7", "/tree 99x99", "/tree 1.99", "/lens x", "/attention L99", "/why vs", "/neurons 99", "/edit",
    "/numerics fp7", "/clear now", "/kv 99", "/export x.txt", "/picture x.txt", "/report x.txt", "/special maybe",
    "/choices one", "/rope x", "/step sideways", "/diff a",
)  # fmt: skip


class _Hook:
    """Whether Ctrl-C was sent.

    A call count triggers it, so one seed always cancels at the same place.
    """

    fired = False


@contextmanager
def _interrupted(hook: _Hook, calls: int | None) -> Iterator[None]:
    """Simulate Ctrl-C after a number of function calls inside the context."""
    if calls is None:
        yield
        return
    handler, unraisable = signal.getsignal(signal.SIGINT), sys.unraisablehook
    interrupts = Interrupts()
    left = calls

    def count(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal left
        left -= event == "call" and interrupts._armed
        if left < 0 and not hook.fired and "llama_scratch" in frame.f_code.co_filename:
            hook.fired = True
            sys.setprofile(None)
            interrupts._handle(signal.SIGINT, frame)

    try:
        with interrupts.armed():
            sys.setprofile(count)
            yield
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = unraisable


# --- The command ------------------------------------------------------------------------------


def small_model(path: Path, seed: int = 0) -> str:
    """Write a small random model with rounding errors like a trained one's.

    They are about 1e-6, not 1e-5.

    The checkpoints of the other tests have queries and keys three times as large, so each head attends to one token.
    """
    file = write_meta(path, seed=seed) / "consolidated.00.pth"
    weights = torch.load(file)
    torch.save({name: w / 3 if ".wq." in name or ".wk." in name else w for name, w in weights.items()}, file)
    return str(path)


def soaks(folder: Path, seed: int, commands: int) -> Iterator[tuple[str, Soak, int]]:
    """Name, session and number of commands of each part.

    A pipe and a terminal on a small model, and a terminal on SmolLM2.
    """
    model = small_model(folder / "Tiny-Llama-Instruct")
    other = small_model(folder / "Other-Llama-Instruct", seed=1)
    real = min(commands // 20, 500)
    half = (commands - real) // 2
    yield "pipe", Soak(folder, model, other, seed, context=96, interactive=False), half
    yield (
        "terminal",
        Soak(folder, model, other, seed + 1, context=96, interactive=True, generate=3),
        commands - real - half,
    )
    if real:
        path = str(pull("smollm2", silent)[0].path)
        precisions = ("fp32", "fp16")
        yield "smollm2", Soak(folder, path, path, seed + 2, context=64, interactive=True, precisions=precisions), real


def main() -> int:
    """Run the soak test and record its figures."""
    parser = argparse.ArgumentParser("python -m tests.trust.soak", description=__doc__)
    parser.add_argument("--commands", type=int, default=10_000, help="commands in all sessions (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=("soak", "determinism"), default="soak")
    options = parser.parse_args()
    if options.part == "determinism":
        from tests.trust import determinism

        return determinism.main()
    kinds: Counter[str] = Counter()
    compared: Counter[str] = Counter()
    worst: dict[str, float] = {}
    findings: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, soak, share in soaks(Path(folder), options.seed, options.commands):

            def tell(n: int, name: str = name, share: int = share) -> None:
                if n % 100 == 0:
                    seconds = time.monotonic() - started
                    print(f"{name}: {n:,} of {share:,} commands, {seconds:,.0f} s", file=sys.stderr)

            try:
                soak.run(share, tell)
            except FoundError as error:
                findings.append(f"{name}: {error}")
                print(findings[-1], file=sys.stderr)
            kinds += soak.kinds
            compared += soak.compared
            for precision, difference in soak.worst.items():
                worst[precision] = max(worst.get(precision, 0.0), difference)
    interrupted = kinds.pop("interrupted", 0)
    figures = {
        "seed": options.seed,
        "commands": kinds.total(),
        "commands_by_kind": dict(kinds.most_common()),
        "interrupted": interrupted,
        "compared": dict(compared),
        "worst_relative_difference": worst,
        "bounds": BOUNDS | {REPEATED: REPEATED_BOUND},
        "seconds": round(time.monotonic() - started),
        "findings": findings,
    }
    write("soak", figures)
    print(json.dumps(figures, indent=2))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
