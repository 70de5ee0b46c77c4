"""A tree of probable continuations, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama_scratch.errors import UsageError
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.inference.prompt_text import Prompt
from llama_scratch.results import Candidate, JsonResult, Token
from llama_scratch.system.progress import Progress, silent

MAX_WIDTH, MAX_DEPTH, MAX_LEAVES = 10, 6, 1000


@dataclass(frozen=True)
class Branch(Candidate):
    """A token that may come next, and its continuations.

    Attributes:
        path_logprob: Natural logarithm of the probability of all tokens from the prompt to this one.
        stop: Whether it is a stop token.
        children: The most probable tokens after it.
    """

    json_fields = (*Candidate.json_fields, "path_logprob", "path_probability", "stop", "children")

    path_logprob: float
    stop: bool
    children: tuple[Branch, ...]

    @property
    def path_probability(self) -> float:
        """Probability of all tokens from the prompt to this one, between 0 and 1."""
        return math.exp(self.path_logprob)


@dataclass(frozen=True)
class Tree(JsonResult):
    """The most probable continuations of a prompt.

    Attributes:
        tokens: The tokens of the prompt.
        width: Number of branches at each token.
        depth: Maximum number of tokens in a path. A stop token ends the path.
        branches: The first tokens, best first.
    """

    tokens: tuple[Token, ...]
    width: int
    depth: int
    branches: tuple[Branch, ...]


def check_size(width: int, depth: int) -> None:
    """Check the size of a tree.

    Args:
        width: Number of branches at each token.
        depth: Number of tokens in a path.

    Raises:
        UsageError: If the tree is too large, or empty.
    """
    if not (1 <= width <= MAX_WIDTH and 1 <= depth <= MAX_DEPTH and width**depth <= MAX_LEAVES):
        raise UsageError(
            f"A tree of {width}x{depth} is not possible. Choose a width of 1 to {MAX_WIDTH} and a depth of 1 to "
            f"{MAX_DEPTH} with at most {MAX_LEAVES:,} leaves, such as 3x3 or 10x3."
        )


def tree(llama: LoadedModel, prompt: Prompt, width: int = 3, depth: int = 3, progress: Progress = silent) -> Tree:
    """Return a tree of the most probable next tokens, and of the tokens after each.

    Raises the same errors as `Llama.predict`.

    Args:
        llama: The model.
        prompt: The prompt.
        width: Number of branches at each token.
        depth: Maximum number of tokens in a path.
        progress: Called with "reading" for the prompt, then with "growing" and the number of predictions.

    Raises:
        UsageError: If the tree is too large, or empty.
    """
    check_size(width, depth)
    ids = llama.encode(prompt)
    total = sum(width**level for level in range(depth))
    grown = 0

    # Depth first: each prediction then computes only one token that is not cached.
    def grow(ids: list[int], levels: int, path_logprob: float) -> tuple[Branch, ...]:
        nonlocal grown
        logits = llama.engine.next_logits(ids, progress if grown == 0 else silent).values
        grown += 1
        progress("growing", grown, total)
        branches = []
        for candidate in llama.candidates(logits, width):
            stop = candidate.id in llama.tokenizer.stop_ids
            path = path_logprob + candidate.logprob
            full = len(ids) == llama.context
            children = () if stop or full or levels == 1 else grow([*ids, candidate.id], levels - 1, path)
            branches.append(Branch(candidate.id, candidate.text, candidate.logprob, path, stop, children))
        return tuple(branches)

    branches = grow(ids, depth, 0.0)
    return Tree(tuple(map(llama.token, ids)), width, depth, branches)


def walk(llama: LoadedModel, ids: Sequence[int], path: Sequence[int], progress: Progress = silent) -> list[int]:
    """Extend a text along a path in its tree.

    [1, 2] adds the most probable next token, then the second most probable token after it. Raises the same errors as
    `Llama.predict`.

    Args:
        llama: The model.
        ids: The token ids of the text.
        path: The ranks of the branches, from 1.
        progress: As for `Llama.predict`.

    Returns:
        The token ids of the extended text.

    Raises:
        UsageError: If a branch does not exist.
    """
    name = ".".join(map(str, path))
    if len(path) > MAX_DEPTH or not all(1 <= rank <= MAX_WIDTH for rank in path):
        raise UsageError(
            f"Branch {name} does not exist. Use at most {MAX_DEPTH} numbers from 1 to {MAX_WIDTH}, such as 1.2."
        )
    there = list(ids)
    for step, rank in enumerate(path):
        if step and there[-1] in llama.tokenizer.stop_ids:
            end = ".".join(map(str, path[:step]))
            raise UsageError(f"Branch {name} does not exist, because the text ends at {end}. Choose another branch.")
        logits = llama.engine.next_logits(there, progress).values
        there.append(llama.candidates(logits, rank)[-1].id)
    return there
