"""The options of the commands, each declared once with its help.

The decorator `with_options` adds them to a command. `HelpCommand` and `HelpGroup` print the help.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial, wraps
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text
from typer.core import TyperCommand, TyperGroup, TyperOption

from llama_scratch.errors import UsageError
from llama_scratch.precision import ACTIVATIONS, PRECISIONS

# The help of the main command explains the environment variables once for all options.
option = partial(typer.Option, show_envvar=False)
ModelPath = Annotated[
    str | None, typer.Argument(metavar="PATH", help="Path of a model (default: the one that would run).")
]
AsJson = Annotated[bool, option("--json", metavar="", help="Print one JSON object.")]


def model_names() -> list[str]:
    """Model names for shell completion."""
    from llama_scratch.download.pypi import OPEN_MODELS

    return list(OPEN_MODELS)


def _precisions() -> list[str]:
    return ["auto", *PRECISIONS]


def _activations() -> list[str]:
    return ["auto", *ACTIVATIONS]


def _devices() -> list[str]:
    return ["auto", "cpu", "cuda", "mps"]


def _model_option(name: str, metavar: str, help: str, values: Callable[[], list[str]] | None = None) -> Any:
    """Declare a model option.

    Args:
        name: The option, such as --model.
        metavar: The name of its value in the help.
        help: The help.
        values: Returns the values for shell completion. None: the shell completes file names.
    """
    panel = "Model (before or after a subcommand)"
    return option(name, metavar=metavar, help=help, rich_help_panel=panel, autocompletion=values)


@dataclass(frozen=True)
class ModelOptions:
    """The model and its settings. None: the option was not given."""

    model_dir: Annotated[
        str | None,
        _model_option(
            "--model-dir",
            "PATH",
            "Model directory (Meta or Hugging Face format) or .gguf file, also at gs:// or az://.",
        ),
    ] = None
    model: Annotated[
        str | None,
        _model_option(
            "--model", "NAME", "Model that 'pull' downloaded: smollm2, OWNER/REPO, Llama3.2-1B.", model_names
        ),
    ] = None
    tokenizer: Annotated[
        str | None, _model_option("--tokenizer", "PATH", "Path to tokenizer.model, if it is not with the model.")
    ] = None
    precision: Annotated[
        str | None,
        _model_option(
            "--precision",
            "NAME",
            f"Weight data type: auto (as in the file), {', '.join(PRECISIONS)}.",
            _precisions,
        ),
    ] = None
    activations: Annotated[
        str | None,
        _model_option(
            "--activations",
            "NAME",
            f"Activation data type: auto, {', '.join(ACTIVATIONS)}.",
            _activations,
        ),
    ] = None
    device: Annotated[
        str | None,
        _model_option(
            "--device",
            "NAME",
            "Device: auto (CUDA if available, else CPU), cpu, cuda, mps.",
            _devices,
        ),
    ] = None
    threads: Annotated[int | None, _model_option("--threads", "N", "Number of CPU threads.")] = None
    context: Annotated[int | None, _model_option("--context", "N", "Maximum context length in tokens.")] = None
    rope_factor: Annotated[
        float | None, _model_option("--rope-factor", "N", "RoPE scaling factor (default: the model's).")
    ] = None
    calibration: Annotated[
        str | None, _model_option("--calibration", "FILE", "Calibration text for int4 quantization.")
    ] = None

    def overriding(self, other: ModelOptions) -> ModelOptions:
        """Merge two sets of options. These take precedence over `other`.

        Giving `model` also overrides `model_dir`, and vice versa.
        """
        values = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        if values.keys() & {"model", "model_dir"}:
            other = replace(other, model=None, model_dir=None)
        return replace(other, **values)

    @property
    def source(self) -> str | None:
        """The `source` argument of `Llama.load`.

        Raises:
            UsageError: If both options were given.
        """
        if self.model is not None and self.model_dir is not None:
            raise UsageError("Both --model and --model-dir were given. Use only one of them.")
        return self.model if self.model is not None else self.model_dir


@dataclass(frozen=True)
class AnswerOptions:
    """Options for the prompt and its answer."""

    prompt: Annotated[
        str | None,
        option("--prompt", "-p", metavar="TEXT", help='Answer this prompt and exit; "-": read it from stdin.'),
    ] = None
    top: Annotated[
        int | None, option("--top", metavar="N", help="Most likely tokens to list (default: 5).", show_default=False)
    ] = None
    generate: Annotated[
        int,
        option("--generate", "-n", metavar="N", help="Number of tokens to generate (default: 0).", show_default=False),
    ] = 0
    temperature: Annotated[
        float,
        option(
            "--temperature",
            metavar="T",
            help="Sampling temperature; 0 (default): greedy decoding.",
            show_default=False,
        ),
    ] = 0.0
    top_k: Annotated[
        int,
        option(
            "--top-k",
            metavar="K",
            help="Top-k sampling: the K most likely tokens (default: all).",
            show_default=False,
        ),
    ] = 0
    top_p: Annotated[
        float,
        option(
            "--top-p",
            metavar="P",
            help="Nucleus sampling: smallest set of tokens with total probability P (default: 1).",
            show_default=False,
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        option(
            "--min-p",
            metavar="P",
            help="Min-p sampling: tokens with at least P times the top probability (default: 0).",
            show_default=False,
        ),
    ] = 0.0
    seed: Annotated[int | None, option("--seed", metavar="N", help="Random seed for sampling.")] = None
    chat: Annotated[
        bool,
        option("--chat", metavar="", help="Chat with an Instruct model: each line is a message."),
    ] = False
    system: Annotated[str | None, option("--system", metavar="TEXT", help="System prompt; starts a chat.")] = None
    special: Annotated[
        bool,
        option("--special", metavar="", help="Parse special tokens such as <|eot_id|> in prompts."),
    ] = False
    commands: Annotated[
        bool,
        option("--commands", metavar="", help="In a pipe, lines that begin with / are commands (// for a literal /)."),
    ] = False
    live: Annotated[
        bool,
        option("--live/--no-live", metavar="", help="Predict while you type (default: on).", show_default=False),
    ] = True


@dataclass(frozen=True)
class OutputOptions:
    """Options for output and interaction, shared by all commands."""

    json: Annotated[bool, option("--json", metavar="", help="Print one JSON object per prompt.")] = False
    plain: Annotated[bool, option("--plain", metavar="", help="No colors, tables or bars, for screen readers.")] = False
    no_color: Annotated[bool, option("--no-color", metavar="", help="Disable colors.")] = False
    quiet: Annotated[bool, option("--quiet", "-q", metavar="", help="Hide progress and notes on stderr.")] = False
    no_input: Annotated[bool, option("--no-input", metavar="", help="Never ask questions.")] = False
    debug: Annotated[bool, option("--debug", metavar="", help="Show tracebacks of errors.")] = False


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Expand each dataclass of options in a command's signature into its options.

    The `ModelOptions` that the command receives include those given before the subcommand.
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
    """Convert the fields of a dataclass to the parameters of a function."""
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]


def model_options(
    ctx: typer.Context, sources: Sequence[str] = ("DEFAULT_MAP", "ENVIRONMENT", "COMMANDLINE")
) -> ModelOptions:
    """Collect the model options of a command.

    Flags override the environment, and the environment overrides the file. Within each of these sources, options of the
    subcommand override options of the main command.

    Args:
        ctx: The context of the command.
        sources: The sources to read, in ascending order of precedence.
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


# --- Help -------------------------------------------------------------------------------------

# Below this width, typer's tables truncate the names of options.
_MIN_TABLE_WIDTH = 72


class _ReadableHelp:
    """Help that is also readable on a narrow terminal. For subclasses of typer's classes."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help.

        Like typer, it prints directly instead of using the formatter.

        Args:
            ctx: The context of the command.
            formatter: Not used, but required by the interface.
        """
        if shutil.get_terminal_size().columns >= _MIN_TABLE_WIDTH:
            super().format_help(ctx, formatter)  # type: ignore[misc]  # of typer's class
        else:
            _print_narrow_help(self, ctx)


class HelpCommand(_ReadableHelp, TyperCommand):
    """A command whose help is also readable on a narrow terminal."""


class HelpGroup(_ReadableHelp, TyperGroup):
    """A main command whose help is also readable on a narrow terminal."""


def _print_narrow_help(command: Any, ctx: Any) -> None:
    """Print the help without tables: the help of each option is below its name."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        if record := parameter.get_help_record(ctx):
            default = "Options" if isinstance(parameter, TyperOption) else "Arguments"
            panel = getattr(parameter, "rich_help_panel", None) or default
            panels.setdefault(panel, []).append((record[0].replace(" <str>", ""), record[1]))
    if isinstance(command, HelpGroup):
        for name, subcommand in command.commands.items():
            summary = inspect.cleandoc(subcommand.help or "").split("\n\n")[0]
            panels.setdefault("Commands", []).append((name, summary))
    console = Console(highlight=False, emoji=False)
    console.print(Text(command.get_usage(ctx), style="bold"))
    console.print(Text(f"\n{inspect.cleandoc(command.help or '')}"))
    for title, records in panels.items():
        console.print(Text(f"\n{title}:", style="bold"))
        for name, text in records:
            console.print(Padding(Text(name, style="cyan"), (0, 0, 0, 2)))
            console.print(Padding(Text(text), (0, 0, 0, 6)))
