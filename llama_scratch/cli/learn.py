"""The `learn` subcommands: the exercises, their checks and their solutions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

from llama_scratch.cli.options import AsJson, HelpCommand, HelpGroup
from llama_scratch.cli.process import NAME, Consoles, print_json
from llama_scratch.errors import UsageError
from llama_scratch.learn.chapters import CHAPTERS

learn = typer.Typer(
    name="learn",
    cls=HelpGroup,
    invoke_without_command=True,
    help="Write the network yourself, one function per chapter, and check each.",
)
Chapter = Annotated[int, typer.Argument(metavar="CHAPTER", help="Number of the chapter.")]


@learn.callback()
def exercises(ctx: typer.Context) -> None:
    """List the chapters and the functions to write."""
    if ctx.invoked_subcommand is not None:
        return
    from llama_scratch.learn.exercises import exercises_of

    consoles: Consoles = ctx.obj
    for chapter, title in enumerate(CHAPTERS):
        names = ", ".join(exercise.function for exercise in exercises_of(chapter))
        consoles.out.print(Text(f"{chapter:2}  {title}"))
        consoles.out.print(Padding(Text(names, style="cyan"), (0, 0, 0, 4), expand=False))
    consoles.note(f"'{NAME} learn task 0' says what to write, and '{NAME} learn check 0 my_llama.py' checks it.")


@learn.command(cls=HelpCommand)
def task(ctx: typer.Context, chapter: Chapter) -> None:
    """Print the functions to write for a chapter, without their code."""
    consoles: Consoles = ctx.obj
    for function in _functions(chapter):
        lines = inspect.getsource(function).splitlines()
        end = next(i for i, line in enumerate(lines) if i and line.strip().endswith('"""'))
        consoles.out.print(Text("\n".join(lines[: end + 1]) + "\n"), soft_wrap=True)


@learn.command(cls=HelpCommand)
def check(
    ctx: typer.Context,
    chapter: Chapter,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Your Python file, such as my_llama.py.")],
    json: AsJson = False,
) -> None:
    """Check the functions of a chapter in your file. The exit code is 1 if one is wrong.

    The functions are called with seeded inputs. From chapter 9 on, the whole network also runs SmolLM2, if it has been
    fetched.
    """
    _check_chapter(chapter)
    from llama_scratch.learn.check import check as run

    consoles: Consoles = ctx.obj
    checked = run(chapter, file)
    if json or consoles.json:
        print_json({"chapter": chapter, "functions": [vars(each) for each in checked]})
    else:
        for each in checked:
            mark, style = ("wrong", "bold") if each.problem else ("right", "")
            consoles.out.print(Text.assemble((f"{mark}  ", style), (each.function, "cyan")))
            if each.problem:
                consoles.out.print(Padding(Text(each.problem), (0, 0, 0, 7), expand=False))
    if any(each.problem for each in checked):
        raise typer.Exit(1)


@learn.command(cls=HelpCommand)
def solution(ctx: typer.Context, chapter: Chapter) -> None:
    """Print a solution of a chapter."""
    consoles: Consoles = ctx.obj
    from rich.syntax import Syntax

    source = "\n\n".join(inspect.getsource(function) for function in _functions(chapter))
    if sys.stdout.isatty():
        consoles.out.print(Syntax(source, "python", theme="ansi_dark", background_color="default", word_wrap=True))
    else:
        print(source, end="")


def _functions(chapter: int) -> list[Callable[..., Any]]:
    _check_chapter(chapter)
    from llama_scratch.learn.exercises import exercises_of

    return [exercise.solution for exercise in exercises_of(chapter)]


def _check_chapter(chapter: int) -> None:
    if not 0 <= chapter < len(CHAPTERS):
        raise UsageError(f"There is no chapter {chapter}. Chapters go from 0 to {len(CHAPTERS) - 1}.")
