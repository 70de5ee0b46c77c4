"""The options of the commands, each declared once with its help, and the decorator that gives them to a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial, wraps
from typing import Annotated, Any, get_type_hints

import typer

from llama_scratch.errors import UsageError
from llama_scratch.precision import ACTIVATIONS, PRECISIONS

# Each option can stand in the environment too; the help says so once.
option = partial(typer.Option, show_envvar=False)
ModelPath = Annotated[str | None, typer.Argument(metavar="PATH", help="A model; by default the one that would run.")]
AsJson = Annotated[bool, option("--json", metavar="", help="One JSON object.")]


def model_names() -> list[str]:
    """The names that completion offers for a model."""
    from llama_scratch.download.pypi import OPEN_MODELS

    return list(OPEN_MODELS)


def _precisions() -> list[str]:
    return ["auto", *PRECISIONS]


def _activations() -> list[str]:
    return ["auto", *ACTIVATIONS]


def _devices() -> list[str]:
    return ["auto", "cpu", "cuda", "mps"]


def _model_option(name: str, metavar: str, help: str, values: Callable[[], list[str]] | None = None) -> Any:
    """values: what completion offers; None: what the shell itself does, which are files."""
    panel = "Model (before or after a subcommand)"
    return option(name, metavar=metavar, help=help, rich_help_panel=panel, autocompletion=values)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is run; None where the option was not given."""

    model_dir: Annotated[
        str | None,
        _model_option(
            "--model-dir",
            "PATH",
            "A directory of Meta's or Hugging Face's files, or a .gguf file; also at gs:// or az://.",
        ),
    ] = None
    model: Annotated[
        str | None,
        _model_option("--model", "NAME", "What 'pull' fetched: smollm2, OWNER/REPO, Llama3.2-1B.", model_names),
    ] = None
    tokenizer: Annotated[str | None, _model_option("--tokenizer", "PATH", "A tokenizer.model elsewhere.")] = None
    precision: Annotated[
        str | None,
        _model_option(
            "--precision",
            "NAME",
            f"auto (the file's own type), {', '.join(PRECISIONS)}.",
            _precisions,
        ),
    ] = None
    activations: Annotated[
        str | None,
        _model_option(
            "--activations",
            "NAME",
            f"Between the layers: auto, {', '.join(ACTIVATIONS)}.",
            _activations,
        ),
    ] = None
    device: Annotated[
        str | None,
        _model_option(
            "--device",
            "NAME",
            "auto (CUDA where there is one, else the CPU), cpu, cuda or mps.",
            _devices,
        ),
    ] = None
    threads: Annotated[int | None, _model_option("--threads", "N", "CPU threads.")] = None
    context: Annotated[int | None, _model_option("--context", "N", "Most tokens at once.")] = None
    rope_factor: Annotated[
        float | None, _model_option("--rope-factor", "N", "RoPE scaling in place of the model's.")
    ] = None
    calibration: Annotated[
        str | None, _model_option("--calibration", "FILE", "Text of the kind that int4 is to be best at.")
    ] = None

    def overriding(self, other: ModelOptions) -> ModelOptions:
        """These options, and the other's if one was not given; the two ways to name a model are one option."""
        values = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        if values.keys() & {"model", "model_dir"}:
            other = replace(other, model=None, model_dir=None)
        return replace(other, **values)

    @property
    def source(self) -> str | None:
        """The argument of `Llama.load`."""
        if self.model is not None and self.model_dir is not None:
            raise UsageError("Both --model and --model-dir were given, expected one of them.")
        return self.model if self.model is not None else self.model_dir


@dataclass(frozen=True)
class AnswerOptions:
    """The prompt of the main command, and how it is answered."""

    prompt: Annotated[
        str | None,
        option("--prompt", "-p", metavar="TEXT", help='Answer one prompt and exit; "-": all of standard input.'),
    ] = None
    top: Annotated[int | None, option("--top", metavar="N", help="Candidates listed (5).", show_default=False)] = None
    generate: Annotated[
        int, option("--generate", "-n", metavar="N", help="Go on for N tokens.", show_default=False)
    ] = 0
    temperature: Annotated[
        float,
        option(
            "--temperature",
            metavar="T",
            help="How much chance: 0, always the most probable token (0).",
            show_default=False,
        ),
    ] = 0.0
    top_k: Annotated[
        int, option("--top-k", metavar="K", help="Draw from the K best tokens only (all).", show_default=False)
    ] = 0
    top_p: Annotated[
        float,
        option("--top-p", metavar="P", help="Draw from the best ones that have P together (1).", show_default=False),
    ] = 1.0
    min_p: Annotated[
        float,
        option("--min-p", metavar="P", help="Draw from those with P times the best one's (0).", show_default=False),
    ] = 0.0
    seed: Annotated[int | None, option("--seed", metavar="N", help="Where chance starts.")] = None
    chat: Annotated[
        bool,
        option("--chat", metavar="", help="Talk with a model that was trained for it: each line is a message."),
    ] = False
    system: Annotated[
        str | None, option("--system", metavar="TEXT", help="The system prompt of the chat, which it begins.")
    ] = None
    special: Annotated[
        bool,
        option("--special", metavar="", help="Names such as <|eot_id|> in a prompt are the special tokens."),
    ] = False
    commands: Annotated[
        bool,
        option("--commands", metavar="", help="In a pipe, lines that begin with / are commands (// escapes)."),
    ] = False
    live: Annotated[
        bool,
        option("--live/--no-live", metavar="", help="Predict while you type, or only at Enter.", show_default=False),
    ] = True


@dataclass(frozen=True)
class OutputOptions:
    """How the main command and its subcommands print, and whether they ask."""

    json: Annotated[bool, option("--json", metavar="", help="One JSON object a prompt.")] = False
    plain: Annotated[bool, option("--plain", metavar="", help="No colors, tables or bars; for screen readers.")] = False
    no_color: Annotated[bool, option("--no-color", metavar="", help="No colors.")] = False
    quiet: Annotated[bool, option("--quiet", "-q", metavar="", help="No progress and no notes on stderr.")] = False
    no_input: Annotated[bool, option("--no-input", metavar="", help="Never ask anything.")] = False
    debug: Annotated[bool, option("--debug", metavar="", help="Show tracebacks.")] = False


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a command that is a dataclass of options by one parameter per option.

    The command gets its `ModelOptions` with those of the main command, which may stand before a subcommand too.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {
        name: parameter.annotation for name, parameter in parameters.items() if is_dataclass(parameter.annotation)
    }

    @wraps(command)
    def gather(**arguments: Any) -> None:
        for name, group in groups.items():
            values = {field.name: arguments.pop(field.name) for field in fields(group)}
            arguments[name] = model_options(arguments["ctx"]) if group is ModelOptions else group(**values)
        command(**arguments)

    flat: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        flat += _parameters(groups[name]) if name in groups else [parameter.replace(kind=parameter.KEYWORD_ONLY)]
    # typer reads a command's options from its signature.
    gather.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    return gather


def _parameters(group: Any) -> list[inspect.Parameter]:
    """The fields of a dataclass as the parameters of a function."""
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]


def model_options(
    ctx: typer.Context, sources: Sequence[str] = ("DEFAULT_MAP", "ENVIRONMENT", "COMMANDLINE")
) -> ModelOptions:
    """The model options of a command: flags over the environment over the file, a subcommand's over the main one's.

    Args:
        ctx: The context of the command.
        sources: The places where an option counts if it is given there, the strongest last.
    """
    options = ModelOptions()
    for source in sources:
        for context in (ctx.parent, ctx):
            if context is not None:
                values = {
                    field.name: context.params[field.name]
                    for field in fields(ModelOptions)
                    if (origin := context.get_parameter_source(field.name)) and origin.name == source
                }
                options = ModelOptions(**values).overriding(options)
    return options
