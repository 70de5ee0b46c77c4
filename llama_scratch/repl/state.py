"""The state of a session: the model, the settings, and the texts so far as exact token ids.

Everything here is frozen. A session replaces its state in one assignment, so that Ctrl-C never leaves a part of one
state together with a part of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.sampling import Sampling
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import fingerprint_of

if TYPE_CHECKING:
    from llama_scratch.llama import Llama
    from llama_scratch.microscope.interventions import Intervention
    from llama_scratch.render.page import Page
    from llama_scratch.repl.conversation import Chat
    from llama_scratch.repl.loading import Loading
    from llama_scratch.results import ModelInfo, Prediction

# Number of texts that /undo can go back to.
MAX_SNAPSHOTS = 1000


@dataclass(frozen=True)
class Settings:
    """How each answer is made and shown.

    Args:
        top: Number of candidates.
        generate: Number of further tokens after each answer.
        sampling: How the further tokens are drawn.
        plain: Print sentences instead of tables and bars.
        live: Predict while the user types.
        special: Read names such as `<|eot_id|>` in a prompt as special tokens.
    """

    top: int
    generate: int
    sampling: Sampling
    plain: bool = False
    live: bool = True
    special: bool = False

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UsageError(f"{sanitize(self.top)} candidates were asked for, expected at least 1 (--top).")
        if self.generate < 0:
            raise UsageError(
                f"{sanitize(self.generate)} tokens to generate were asked for, expected at least 0 (--generate)."
            )


@dataclass(frozen=True)
class Snapshot:
    """A text and what comes next: the prediction after it, and the tokens that Enter would add to it.

    interventions: those that were on, so that /undo goes back to the network that gave the answer.
    """

    prediction: Prediction
    offered: tuple[int, ...]
    interventions: tuple[Intervention, ...] = ()

    @property
    def prompt(self) -> str:
        """The text as it was typed, or the decoded tokens."""
        return self.prediction.prompt

    @property
    def top(self) -> int:
        """The number of candidates in the answer."""
        return len(self.prediction.top)

    @property
    def ids(self) -> list[int]:
        """The text's tokens, the beginning-of-text token included."""
        return [token.id for token in self.prediction.tokens]


@dataclass(frozen=True)
class Past:
    """A text of a loaded session that /undo can go back to. It is answered only then, with `top` candidates.

    offered: As in `Snapshot`; None for the predicted token.
    """

    ids: list[int]
    prompt: str
    top: int
    offered: tuple[int, ...] | None
    interventions: tuple[Intervention, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One line that was typed, and the object that answered it."""

    input: str
    output: dict[str, Any]


@dataclass(frozen=True)
class InitialModel:
    """The model that a session began with. It stays known after another model has taken its place.

    rope_factor: The factor in use, 1 if RoPE is not scaled.
    options: See `Llama.options`.
    files, shape, tokenizer: See `session_file.SavedModel`.
    sha256: Computes the digest of the weight files, which stay open for it.
    """

    info: ModelInfo
    path: Path | None
    context: int
    rope_factor: float
    options: Mapping[str, Any]
    files: int | None
    shape: dict[str, Any] | None
    tokenizer: Callable[[], str | None]
    sha256: Callable[[Progress], str]

    @classmethod
    def of(cls, llama: Llama) -> Self:
        """Describe a loaded model."""
        scaling, tokenizer = llama.args.rope_scaling, llama.tokenizer
        files = llama.engine.files
        return cls(
            info=llama.info,
            path=llama.path,
            context=llama.context,
            rope_factor=scaling.factor if scaling else 1.0,
            options=llama.options,
            files=len(files.names),
            shape=asdict(llama.args),
            tokenizer=lambda: fingerprint_of(tokenizer),
            sha256=files.sha256,
        )


@dataclass(frozen=True)
class SessionState:
    """Everything in a session that a command can change and that belongs together.

    Args:
        loading: The model as it was loaded, or on its way.
        settings: How answers are made and shown.
        initial_settings: The settings that the session began with, for /save.
        initial_system: The system prompt that it began with; None if lines were prompts.
        initial_model: The model that it began with; None until the first recorded turn.
        interventions: The changes to the network that are on.
        changed: The model with these changes; None if there are none.
        snapshots: Each text that was answered, the newest last.
        past: The texts before those, of a session that was loaded.
        page: The view that was shown last, for /picture; None for the answer.
        chat: The conversation that each line continues; None if each line is a prompt.
        walk: The position of /step.
        turns: What was typed and the answers to it, for /save. This list grows in place.
    """

    loading: Loading
    settings: Settings
    initial_settings: Settings
    initial_system: str | None = None
    initial_model: InitialModel | None = None
    interventions: tuple[Intervention, ...] = ()
    changed: Llama | None = None
    snapshots: tuple[Snapshot, ...] = ()
    past: tuple[Past, ...] = ()
    page: Page | None = None
    chat: Chat | None = None
    walk: Any | None = None
    turns: list[Turn] = field(default_factory=list)

    @property
    def now(self) -> Snapshot | None:
        """The newest text and what comes next; None before the first."""
        return self.snapshots[-1] if self.snapshots else None

    @property
    def texts(self) -> list[Snapshot | Past]:
        """All texts that are remembered, the newest last."""
        return [*self.past, *self.snapshots]

    @property
    def before(self) -> Snapshot | Past | None:
        """The text that /undo goes back to; None if there is none."""
        texts = self.texts
        return texts[-2] if len(texts) > 1 else None

    @property
    def ids(self) -> list[int]:
        """The text so far. Raises `UsageError` if there is none."""
        if self.now is None:
            raise UsageError("There is no text yet; give a prompt first.")
        return self.now.ids

    @property
    def offered(self) -> Sequence[int]:
        """The tokens that Enter accepts: the predicted one, or all that was generated."""
        return self.now.offered if self.now else ()

    @property
    def labels(self) -> list[str]:
        """The names of the interventions that are on."""
        return [intervention.label for intervention in self.interventions]

    def with_text(self, snapshot: Snapshot) -> SessionState:
        """The state after one more text. Its answer is what was shown last."""
        return replace(self, snapshots=(*self.snapshots[1 - MAX_SNAPSHOTS :], snapshot), page=None)
