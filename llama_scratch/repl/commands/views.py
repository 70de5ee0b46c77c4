"""Looking inside: how a text is cut, how it surprises, what else could come, and how texts and models differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from llama_scratch.config import PRECISIONS
from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.pages import texts as pages
from llama_scratch.repl import transitions
from llama_scratch.repl.commands.registry import Reply, command, paged
from llama_scratch.repl.commands.text import unquoted
from llama_scratch.repl.session import Session

if TYPE_CHECKING:
    from llama_scratch.system.progress import Progress

# The microscope is imported within each command, because it brings torch, and the prompt waits for none.

_TREE = re.compile(r"(?:([0-9]{1,4})x([0-9]{1,4})(?:\s+|\Z))?(\.\.|[0-9]{1,4}(?:\.[0-9]{1,4})*)?")
# A JSON string, or anything else up to a bar.
_PART = re.compile(r'(\s*"(?:[^"\\]|\\.)*"\s*|[^|]*)(\||\Z)')


@command("tokens", "[TEXT]")
def _tokens(session: Session, argument: str) -> Reply:
    """How the text is cut into tokens: ids and bytes."""
    from llama_scratch.microscope.tokens import tokens

    found = tokens(session.llama, session.ids_or_current(argument))
    return paged(session, found.as_json(), pages.tokens(found))


@command("surprisal", "[TEXT]")
def _surprisal(session: Session, argument: str) -> Reply:
    """How much each token of the text surprised the model, in bits.

    A token of probability 1/2 has 1 bit, one of 1/4 has 2. The perplexity is 2 to their mean.
    """
    from llama_scratch.microscope.surprisal import per_character, surprisal

    llama, ids = session.llama, session.ids_or_current(argument)
    with session.screen.progress() as progress:
        found = surprisal(llama, ids, session.settings.top, progress)
    text, bits = session.text_of(ids), per_character(llama, found.tokens)
    return paged(session, found.as_json(), pages.surprisal(found, text, bits))


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
        found = tree(llama, ids, *size, progress)
    # Only now, so that Ctrl-C leaves the text as it was.
    if where == "..":
        transitions.undo(session)
    elif where:
        session.predict(ids)
    return paged(session, found.as_json(), pages.tree(found, session.text_of(ids)))


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


def parts(argument: str) -> Iterator[str]:
    """What stands between bars, stripped; a bar between double quotes belongs to the text."""
    for part in _PART.finditer(argument):
        yield part[1].strip()
        if not part[2]:
            return


def two_texts(argument: str, command: str) -> list[str]:
    """Two texts with a bar between them. Raises `UsageError` where there are more, or fewer."""
    texts = [unquoted(part) for part in parts(argument)]
    if len(texts) != 2 or not all(texts):
        raise UsageError(
            f"'{sanitize(argument)}' was given for {command}, expected two texts with a | between them; "
            "one that has a | in it stands in double quotes."
        )
    return texts


@command("diff", "A | B")
def _diff(session: Session, argument: str) -> Reply:
    """Where the predictions after two texts part, and how far.

    The divergence (Jensen–Shannon) is 0 bits for equal predictions and 1 bit for those with nothing in common.
    A text in double quotes is read as JSON.
    """
    from llama_scratch.microscope.diff import diff

    first, second = map(session.encode, two_texts(argument, "/diff"))
    llama = session.llama
    with session.screen.progress() as progress:
        found = diff(llama, first, second, session.settings.top, progress)
    return paged(session, found.as_json(), pages.diff(found))


@command("choices", "A | B | …")
def _choices(session: Session, argument: str) -> Reply:
    """How probable each continuation is: /choices hot | cold | mild.

    Each gets a space in front, unless it stands in double quotes, which are read as JSON: "\\n" | ", too".
    """
    from llama_scratch.microscope.choices import choices

    given = list(parts(argument))
    # Quotes are gone where they were read.
    texts = [text if (text := unquoted(part)) != part else f" {part}" for part in given]
    if len(texts) < 2 or "" in given or "" in texts:
        raise UsageError(
            f"'{sanitize(argument)}' was given for /choices, expected two or more texts with a | between them."
        )
    llama, ids = session.llama, session.ids
    with session.screen.progress() as progress:
        found = choices(llama, ids, texts, progress)
    return paged(session, found.as_json(), pages.choices(found))


def _models(_session: Session, _begun: str) -> Iterable[str]:
    from llama_scratch.download.pypi import OPEN_MODELS

    return [*PRECISIONS, "auto", *OPEN_MODELS]


@command("compare", "MODEL", complete=_models)
def _compare(session: Session, argument: str) -> Reply:
    """What another model, or precision, says after the text.

    Another model, by its path or the name under which it was pulled, runs in this one's precision.
    """
    from llama_scratch.microscope.compare import compare

    llama, ids = session.llama, session.ids
    with session.screen.progress() as progress:
        same = argument in (*PRECISIONS, "auto")
        source, precision = (str(llama.path), argument) if same else (argument, llama.info.precision)
        other = session.open(source, precision, progress)
        try:
            for each in (llama, other):  # so that the precision that is named is the one that answers
                each.prepare(progress)
            found = compare(llama, other, ids, session.settings.top, progress)
        finally:
            other.close()
    return paged(session, found.as_json(), pages.compare(found))
