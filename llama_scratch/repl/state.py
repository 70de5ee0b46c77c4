"""The state of a session: the model, the settings, and the texts as token ids.

The classes are frozen, and a session replaces its whole state in one assignment. Ctrl-C can therefore never leave it
half changed.
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

# Maximum number of texts that /undo can restore.
MAX_SNAPSHOTS = 1000


@dataclass(frozen=True)
class Settings:
    """Settings for computing and showing answers.

    Args:
        top: Number of candidates.
        generate: Number of tokens to generate after each answer.
        sampling: The sampling options for generated tokens.
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
            raise UsageError(f"The number of candidates is {sanitize(self.top)}, expected at least 1 (--top).")
        if self.generate < 0:
            raise UsageError(
                f"The number of tokens to generate is {sanitize(self.generate)}, expected at least 0 (--generate)."
            )


@dataclass(frozen=True)
class Snapshot:
    """A text with its prediction and the tokens that Enter would add.

    Args:
        prediction: The prediction after the text.
        offered: The tokens that Enter would add.
        interventions: The interventions that were active. /undo restores them too.
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
    """A text of a loaded session.

    Its prediction is computed only if /undo restores the text.

    Args:
        ids: The text's tokens.
        prompt: The text as it was typed, or the decoded tokens.
        top: Number of candidates.
        offered: The tokens that Enter would add. None: the predicted token.
        interventions: The interventions that were active.
    """

    ids: list[int]
    prompt: str
    top: int
    offered: tuple[int, ...] | None
    interventions: tuple[Intervention, ...] = ()


@dataclass(frozen=True)
class Turn:
    """A typed line and the JSON object of its answer."""

    input: str
    output: dict[str, Any]


@dataclass(frozen=True)
class InitialModel:
    """The model that a session began with, described for /save.

    Args:
        info: Its name, format, precision and device.
        path: Its path, if it was loaded from a file.
        context: Its context in tokens.
        rope_factor: The factor in use, 1 if RoPE is not scaled.
        options: See `Llama.options`.
        files: See `session_file.ModelDetails`.
        shape: See `session_file.ModelDetails`.
        tokenizer: Computes the tokenizer's fingerprint.
        sha256: Computes the digest of the weight files, which stay open for this purpose.
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
    """The state of a session that commands can change, replaced as a whole.

    Args:
        loading: The unmodified model, loaded or still loading.
        settings: The settings for computing and showing answers.
        initial_settings: The settings at the start of the session, for /save.
        initial_system: The system prompt at the start, if lines were chat messages.
        initial_model: The model at the start. None until the first recorded turn.
        interventions: The active interventions.
        changed: The model with these interventions, if any.
        snapshots: The answered texts, newest last.
        past: The earlier texts of a loaded session, newest last.
        page: The last view, for /picture. None if it was an answer.
        chat: The conversation that each line continues. None if each line is a prompt.
        walk: The walk of /step and its current stop.
        turns: The typed lines and their answers, for /save. This list grows in place.
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
        """The newest text and its prediction, if any."""
        return self.snapshots[-1] if self.snapshots else None

    @property
    def texts(self) -> list[Snapshot | Past]:
        """All texts in memory, newest last."""
        return [*self.past, *self.snapshots]

    @property
    def before(self) -> Snapshot | Past | None:
        """The text that /undo would restore, if any."""
        texts = self.texts
        return texts[-2] if len(texts) > 1 else None

    @property
    def ids(self) -> list[int]:
        """The token ids of the text so far. Raises `UsageError` before the first text."""
        if self.now is None:
            raise UsageError("There is no text yet. Enter a prompt first.")
        return self.now.ids

    @property
    def offered(self) -> Sequence[int]:
        """The tokens that Enter would add: the predicted token, or all generated tokens."""
        return self.now.offered if self.now else ()

    @property
    def labels(self) -> list[str]:
        """The labels of the active interventions."""
        return [intervention.label for intervention in self.interventions]

    def with_text(self, snapshot: Snapshot) -> SessionState:
        """Return the state with one more text, whose answer becomes the last view."""
        return replace(self, snapshots=(*self.snapshots[1 - MAX_SNAPSHOTS :], snapshot), page=None)
