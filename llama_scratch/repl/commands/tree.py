"""/tree: the most probable continuations as a tree."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.pages import tree as pages
from llama_scratch.repl import transitions
from llama_scratch.repl.commands.registry import Reply, commands_under, paged
from llama_scratch.repl.session import Session
from llama_scratch.system.progress import Progress

# Commands import the microscope when they run: it imports torch, which would delay the prompt.

command = commands_under("Predictions")

_TREE = re.compile(r"(?:([0-9]{1,4})x([0-9]{1,4})(?:\s+|\Z))?(\.\.|[0-9]{1,4}(?:\.[0-9]{1,4})*)?")


def _trees(session: Session, _begun: str) -> Iterable[str]:
    return ["3x3", "2x6", "10x2", *([".."] if session.state.before else [])]


@command("tree", "[WIDTHxDEPTH] [PATH | ..]", complete=_trees)
def _tree(session: Session, argument: str) -> Reply:
    """Tree of the most probable continuations: 3 wide, 3 deep.

    The icicle at the top draws each branch as wide as it is probable. WIDTHxDEPTH sets another size, such as
    2x6. A path such as 1.2 appends the tokens of that branch to the text and shows the tree from there. .. goes back.
    """
    from llama_scratch.microscope.tree import check_size, tree

    matched = _TREE.fullmatch(argument)
    if matched is None:
        raise UsageError(
            f"Invalid argument '{sanitize(argument)}' for /tree. Give a size such as 3x3, a branch such as 1.2, or "
            "'..' to go back."
        )
    width, depth, where = matched.groups()
    size = (int(width), int(depth)) if width else (3, 3)
    check_size(*size)
    llama = session.llama
    with session.screen.progress() as progress:
        ids = _place(session, where, progress)
        branches = tree(llama, ids, *size, progress)
    # Change the text last, so that Ctrl-C leaves it unchanged.
    if where == "..":
        transitions.undo(session)
    elif where:
        session.predict(ids)
    return paged(session, branches.as_json(), pages.page(branches, session.text_of(ids)))


def _place(session: Session, where: str | None, progress: Progress) -> list[int]:
    """Return the token ids of the text at the root of the tree.

    It is the current text, the previous one (..), or the current one extended along a branch.
    """
    from llama_scratch.microscope.tree import walk

    if where is None:
        return session.ids
    if where == "..":
        if session.state.before is None:
            raise UsageError("This is the first text, so .. cannot go back. Use /tree for the current text.")
        return session.state.before.ids
    return walk(session.llama, session.ids, [int(rank) for rank in where.split(".")], progress)
