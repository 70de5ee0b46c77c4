"""The configuration file: TOML with the long options as keys, and a table for each subcommand. Imports no torch.

model = "smollm2"
top = 10
live = false

[bench]
runs = 5
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup, TyperOption

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.system.folders import user_folder
from llama_scratch.system.small_files import read_text

# tomllib takes time quadratic in the parts of a dotted key, which is always within one line. These keep it below 1 s.
_MAX_BYTES, _MAX_DOTS = 1 << 16, 256


def default_path() -> Path:
    """The file that is read if no other is named. Raises FileNotFoundError if there is no home folder."""
    return user_folder("config") / "config.toml"


def read_config(path: str | None, ctx: typer.Context) -> dict[str, Any]:
    """Read the file's values as the `default_map` of a program: by parameter, and by subcommand.

    Args:
        path: The file. None: the default file, which counts as empty if it is missing or cannot be read.
        ctx: The context of the program.

    Raises:
        UsageError: If a named file cannot be read, or if a file is not TOML or holds a key or a value that no
            option has.
    """
    file = Path(os.path.expanduser(path or ""))
    try:
        file = default_path() if path is None else file
        text = read_text(file, _MAX_BYTES, error=UsageError)
    except OSError as error:
        if path is None:  # such as that of another user, after `sudo -u` with the old HOME
            return {}
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UsageError(
                f"There is no configuration file at {sanitize(file, 200)}; write one there, "
                "or name another with --config or $LLAMA_SCRATCH_CONFIG."
            ) from error
        raise UsageError(
            f"The configuration file {sanitize(file, 200)} cannot be read ({error.strerror or error}); "
            "check that it is a file that is there for you to read."
        ) from error
    try:
        if any(line.count(".") > _MAX_DOTS for line in text.split("\n")):
            raise ValueError(f"a line with more than {_MAX_DOTS} dots")
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"The configuration file {sanitize(file, 200)} is not TOML ({sanitize(error, 200)}); "
            "correct it there, expected lines such as top = 10."
        ) from error
    return _defaults(table, ctx, file)


def _defaults(root: Mapping[str, Any], ctx: typer.Context, file: Path) -> dict[str, Any]:
    """The values of the main command by parameter, and a table of values for each subcommand."""
    program = ctx.command
    commands = program.commands if isinstance(program, TyperGroup) else {}
    tables = {name: root[name] for name in commands if name in root}
    values = {key: value for key, value in root.items() if key not in tables}
    options = _options(program)
    defaults = _validated(values, options, [*options, *commands], ctx, file)
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise _wrong(file, name, table, f"a table of its options under [{name}]")
        options = _options(commands[name])
        defaults[name] = _validated(table, options, options, ctx, file, f" in [{name}]")
    return defaults


def _options(command: Any) -> dict[str, TyperOption]:
    """The options that hold a value, by their long names without dashes. --version and --help hold none."""
    return {
        name.removeprefix("--"): option
        for option in command.params
        if isinstance(option, TyperOption) and option.expose_value and not option.is_eager
        for name in option.opts
        if name.startswith("--")
    }


def _validated(
    table: Mapping[str, Any],
    options: Mapping[str, TyperOption],
    known: Iterable[str],
    ctx: typer.Context,
    file: Path,
    where: str = "",
) -> dict[str, Any]:
    """The values by parameter. Raises `UsageError` for an unknown option, or a value that its option does not take."""
    values = {}
    for key, value in table.items():
        option = options.get(key)
        if option is None:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {near[0]}?" if near else "expected a long option without its dashes."
            raise UsageError(f"{sanitize(file, 200)}: there is no option '{sanitize(key)}'{where}; {advice}")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:  # which no option takes, nor TOML
            raise _wrong(file, key, "a number of over 64 bits", "a smaller one")
        if isinstance(value, bool) != option.is_flag:  # which would be taken for 0 and 1, or the other way round
            raise _wrong(file, key, value, "true or false" if option.is_flag else f"what --{key} takes")
        try:
            parsed = option.process_value(ctx, value)
        except typer.BadParameter as error:
            raise _wrong(file, key, value, f"what --{key} takes ({error.message})") from error
        if isinstance(parsed, str) and not isinstance(value, str):  # a number would become one in silence
            raise _wrong(file, key, value, "a text in quotes")
        values[option.name] = value
    return values


def _wrong(file: Path, key: str, value: object, expected: str) -> UsageError:
    try:
        value_text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # a number of thousands of digits in it
        value_text = "a number of over 64 bits"
    return UsageError(f"{sanitize(file, 200)}: {key} is {sanitize(value_text)}, expected {expected}; correct it there.")
