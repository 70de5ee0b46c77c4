"""The command line: the main command, its subcommands, and `run`.

Importing this module does not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from llama_scratch.cli.learn import learn
from llama_scratch.cli.measure import bench
from llama_scratch.cli.models import convert, info, pull, verify
from llama_scratch.cli.opening import load, load_in_background, opener
from llama_scratch.cli.options import (
    AnswerOptions,
    HelpCommand,
    HelpGroup,
    ModelOptions,
    OutputOptions,
    option,
    with_options,
)
from llama_scratch.cli.process import (
    NAME,
    Consoles,
    discard_stdout,
    flush_stdout,
    prepare_streams,
    report,
    tracebacks,
)
from llama_scratch.cli.replay import replay
from llama_scratch.errors import UsageError
from llama_scratch.system import crash_handler
from llama_scratch.system.memory import require_start

# Paragraphs are single lines, because the help wraps them to the width of the terminal.
_HELP = (
    "A microscope for next-token prediction: type a prompt, see what Llama would say next.\n\n"
    "Examples:\n"
    "  llama-scratch\n"
    "      Start an interactive session.\n"
    '  llama-scratch -p "Hot and" --top 3\n'
    "      List the 3 most likely tokens.\n"
    "  llama-scratch -n 30 < prompts.txt\n"
    "      Continue each line by 30 tokens.\n\n"
    "Without --model or --model-dir it runs Llama 3.2 1B if it is in ~/.llama, otherwise SmolLM2-135M, "
    "an open model of the same architecture. If standard input is not a terminal, each line is a prompt.\n\n"
    "Options can also be set in the configuration file (see --config), as top = 10, and in the environment, "
    "as LLAMA_SCRATCH_TOP=10. Flags override the environment, and the environment overrides the file."
)

app = typer.Typer(
    name=NAME,
    cls=HelpGroup,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (pull, info, verify, convert, bench, replay):
    app.command(cls=HelpCommand)(command)
app.add_typer(learn)


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code. Prints errors to stderr."""
    prepare_streams()
    try:
        try:
            code = app(args=arguments, prog_name=NAME, standalone_mode=False) or 0
        except typer.Exit as error:
            code = error.exit_code
        flush_stdout()
        return code
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every unexpected error becomes a message
        return report(error)


def _configure(ctx: typer.Context, path: str | None) -> str | None:
    """Read defaults from the environment and from the configuration file."""
    ctx.auto_envvar_prefix = "LLAMA_SCRATCH"
    from llama_scratch.cli.config_file import read_config  # shell completion does not need it

    ctx.default_map = read_config(path, ctx)
    return path


def _print_version(wanted: bool) -> None:
    if wanted:
        from llama_scratch import __version__

        print(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback(help=_HELP)
@with_options
def main(
    ctx: typer.Context,
    answer: AnswerOptions,
    output: OutputOptions,
    config: Annotated[
        str | None,
        option(
            "--config",
            metavar="PATH",
            envvar="LLAMA_SCRATCH_CONFIG",
            is_eager=True,
            callback=_configure,
            help="Configuration file (default: llama-scratch/config.toml in the configuration folder).",
        ),
    ] = None,
    version: Annotated[
        bool,
        option("--version", metavar="", is_eager=True, callback=_print_version, help="Show the version and exit."),
    ] = False,
    *,
    options: ModelOptions,
) -> None:
    """Answer prompts, or prepare the process for a subcommand.

    Args:
        ctx: The context of the command. Its `obj` is set to the `Consoles` that subcommands use.
        answer: Options for the prompt and its answer.
        output: Options for output and interaction.
        config: The configuration file, which a callback has already read.
        version: Handled by a callback.
        options: The model options.
    """
    if output.debug:
        ctx.with_resource(tracebacks())
    ctx.obj = consoles = Consoles.open(output)
    crash_handler.install()
    if ctx.invoked_subcommand != "pull":
        require_start()
    if ctx.invoked_subcommand is None:
        raise typer.Exit(_answer(answer, output, options, consoles))


def _answer(answer: AnswerOptions, output: OutputOptions, options: ModelOptions, consoles: Consoles) -> int:
    """Run a session, or answer the prompts. Returns the exit code."""
    if answer.generate < 0:
        raise UsageError(f"Cannot generate {answer.generate} tokens. Set --generate to at least 0.")
    if answer.top is not None and answer.top < 1:
        raise UsageError(f"Cannot list {answer.top} candidates. Set --top to at least 1.")
    from llama_scratch.repl.batch import OutputFormat, answer_all
    from llama_scratch.repl.conversation import Chat, checked
    from llama_scratch.repl.loading import Loading
    from llama_scratch.repl.session import Session
    from llama_scratch.repl.state import Settings
    from llama_scratch.sampling import Sampling

    sampling = Sampling(answer.temperature, answer.top_k, answer.top_p, answer.min_p, answer.seed)
    settings = Settings(answer.top or 5, answer.generate, sampling, output.plain, answer.live, answer.special)
    chat = Chat(answer.system or "") if answer.chat or answer.system is not None else None
    format: OutputFormat = "json" if output.json else "terminal" if sys.stdout.isatty() else "lines"
    if answer.prompt is None and sys.stdin.isatty() and format == "terminal":
        from llama_scratch.repl import loop

        loading = load_in_background(options, consoles)
        session = Session(
            loading, consoles.out, settings, opener(options), interactive=True, debug=output.debug, chat=chat
        )
        loop.run(session)
        return 0
    at_terminal = format == "terminal"
    session = Session(
        Loading.ended_with(load(options, consoles)),
        consoles.out if at_terminal else consoles.log,  # in a pipe, stdout is only for data
        settings,
        opener(options),
        interactive=at_terminal,
        lists_candidates=answer.top is not None,
        records_turns=answer.commands,
        debug=output.debug,
    )
    session.screen.explained.update(session.llama.warnings)  # `load` printed them
    if chat:
        session.update(chat=checked(session.llama, chat.system), initial_system=chat.system)
    prompts = _prompts(answer.prompt, consoles)
    try:
        return answer_all(session, prompts, format, commands=answer.commands, log=consoles.log)
    except BrokenPipeError:  # not an error: the reader closed the pipe
        discard_stdout()
        return 0


def _prompts(prompt: str | None, consoles: Consoles) -> Iterable[str]:
    """Return the prompts to answer.

    Args:
        prompt: The prompt; "-" for all of standard input, or None for each line of it.
        consoles: Consoles for the hint if standard input is a terminal.
    """
    from llama_scratch.repl.batch import stdin_lines, stdin_text

    if prompt in (None, "-") and sys.stdin.isatty():
        source = "the prompt" if prompt else "prompts, one per line,"
        consoles.log.print(f"Reading {source} from the terminal. Ctrl-D ends the input.", soft_wrap=True)
    if prompt is None:
        return stdin_lines()
    text = stdin_text() if prompt == "-" else prompt
    if text == "":
        raise UsageError("The prompt is empty. Pass some text with --prompt.")
    return [text]
