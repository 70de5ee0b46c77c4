"""The most probable continuations as a tree."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.pages import tree as pages
from llama_scratch.repl import transitions
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session
from llama_scratch.system.progress import Progress

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

command = commands_under("Looking at it")

_TREE = re.compile(r"(?:([0-9]{1,4})x([0-9]{1,4})(?:\s+|\Z))?(\.\.|[0-9]{1,4}(?:\.[0-9]{1,4})*)?")


def _trees(session: Session, _begun: str) -> Iterable[str]:
    return ["3x3", "2x6", "10x2", *([".."] if session.state.before else [])]


@command("tree", "[WIDTHxDEPTH] [PATH | ..]", complete=_trees)
def _tree(session: Session, argument: str) -> Reply:
    """What may come next as a tree: 3x3 is three wide, three deep.

    A path such as 1.2 adds the tokens of that branch to the text and shows the tree from there; .. goes back.
    """
    from llama_scratch.microscope.tree import check_size, tree

    matched = _TREE.fullmatch(argument)
    if matched is None:
        raise UsageError(
            f"'{sanitize(argument)}' was given for /tree, expected a size such as 3x3, a branch such as 1.2, or '..' "
            "for the way back."
        )
    width, depth, where = matched.groups()
    size = (int(width), int(depth)) if width else (3, 3)
    check_size(*size)
    llama = session.llama
    with session.screen.progress() as progress:
        ids = _place(session, where, progress)
        branches = tree(llama, ids, *size, progress)
    # Only now, so that Ctrl-C leaves the text as it was.
    if where == "..":
        transitions.undo(session)
    elif where:
        session.predict(ids)
    return paged(session, branches.as_json(), pages.page(branches, session.text_of(ids)))


def _place(session: Session, where: str | None, progress: Progress) -> list[int]:
    """The text whose tree is meant: the one so far, the one before it, or a branch of the one so far."""
    from llama_scratch.microscope.tree import walk

    if where is None:
        return session.ids
    if where == "..":
        if session.state.before is None:
            raise UsageError("There is no way back, expected an earlier text; /tree shows the tree from here.")
        return session.state.before.ids
    return walk(session.llama, session.ids, [int(rank) for rank in where.split(".")], progress)
