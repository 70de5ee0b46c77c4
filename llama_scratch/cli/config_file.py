"""The configuration file: TOML, a key per long option, a table per subcommand.

Importing this module does not import torch. An example:

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

# tomllib takes quadratic time in the number of parts of a dotted key. These limits keep the time below 1 s. Dots are
# counted per line, because a dotted key is always on one line.
_MAX_BYTES, _MAX_DOTS = 1 << 16, 256


def default_path() -> Path:
    """The default configuration file. Raises FileNotFoundError without a home folder."""
    return user_folder("config") / "config.toml"


def read_config(path: str | None, ctx: typer.Context) -> dict[str, Any]:
    """Read the configuration file as typer's `default_map`.

    Args:
        path: The file. None: the default file, which is treated as empty if it is missing or not readable.
        ctx: The context of the main command.

    Returns:
        The values by parameter, and a dictionary of values for each subcommand.

    Raises:
        UsageError: If the file at `path` cannot be read, is not valid TOML, or has an unknown option or an invalid
            value.
    """
    file = Path(os.path.expanduser(path or ""))
    try:
        file = default_path() if path is None else file
        text = read_text(file, _MAX_BYTES, error=UsageError)
    except OSError as error:
        if path is None:  # e.g. the file of another user: `sudo -u` may keep HOME
            return {}
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UsageError(
                f"Configuration file not found: {sanitize(file, 200)}. Create it, "
                "or choose another file with --config or $LLAMA_SCRATCH_CONFIG."
            ) from error
        raise UsageError(
            f"The configuration file {sanitize(file, 200)} cannot be read ({error.strerror or error}). "
            "Check that it is a regular file and that you have permission to read it."
        ) from error
    try:
        if any(line.count(".") > _MAX_DOTS for line in text.split("\n")):
            raise ValueError(f"a line with more than {_MAX_DOTS} dots")
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"The configuration file {sanitize(file, 200)} is not valid TOML ({sanitize(error, 200)}). "
            "Write one option per line, such as top = 10."
        ) from error
    return _defaults(table, ctx, file)


def _defaults(root: Mapping[str, Any], ctx: typer.Context, file: Path) -> dict[str, Any]:
    """Return the values by parameter, and a table of values for each subcommand."""
    program = ctx.command
    commands = program.commands if isinstance(program, TyperGroup) else {}
    tables = {name: root[name] for name in commands if name in root}
    values = {key: value for key, value in root.items() if key not in tables}
    options = _options(program)
    defaults = _validated(values, options, [*options, *commands], ctx, file)
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise _wrong(file, name, table, f"a table of options under [{name}]")
        options = _options(commands[name])
        defaults[name] = _validated(table, options, options, ctx, file, f" in [{name}]")
    return defaults


def _options(command: Any) -> dict[str, TyperOption]:
    """The options by long name without dashes, except --version and --help."""
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
    """Return the values by parameter.

    Raises:
        UsageError: If an option is unknown or a value is not valid.
    """
    values = {}
    for key, value in table.items():
        option = options.get(key)
        if option is None:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"Did you mean {near[0]}?" if near else "Use the name of a long option without the dashes."
            raise UsageError(f"{sanitize(file, 200)}: unknown option '{sanitize(key)}'{where}. {advice}")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:  # TOML's range
            raise _wrong(file, key, "a number of more than 64 bits", "smaller")
        if isinstance(value, bool) != option.is_flag:  # Python would accept True as 1, and 1 as True
            raise _wrong(file, key, value, "true or false" if option.is_flag else f"a valid value for --{key}")
        try:
            parsed = option.process_value(ctx, value)
        except typer.BadParameter as error:
            raise _wrong(file, key, value, f"a valid value for --{key} ({error.message.rstrip('.')})") from error
        if isinstance(parsed, str) and not isinstance(value, str):  # otherwise a number would silently become text
            raise _wrong(file, key, value, "a string in quotes")
        values[option.name] = value
    return values


def _wrong(file: Path, key: str, value: object, expected: str) -> UsageError:
    try:
        value_text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # Python does not format integers with thousands of digits
        value_text = "a number of more than 64 bits"
    return UsageError(f"{sanitize(file, 200)}: {key} is {sanitize(value_text)}. It must be {expected}.")
