"""Run a reader's file and compare its functions, in a process of its own.

    python -m llama_scratch.learn.child CHAPTER FILE

Prints one line of JSON: a list of [function, sentence], with "" for a function that is right. The output of the file
itself is discarded.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llama_scratch.errors import ModelNotFoundError, sanitize
from llama_scratch.learn import solution
from llama_scratch.learn.comparison import MAX_DISTANCE, difference, distance, equal
from llama_scratch.learn.exercises import Exercise, exercises_of
from llama_scratch.learn.mistakes import mistakes_of


def main() -> None:
    """Check the exercises of a chapter."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    chapter, path = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_grad_enabled(False)
    found = []
    module = _load(path)
    for exercise in exercises_of(chapter):
        found.append((exercise.function, module if isinstance(module, str) else check(exercise, module)))
        if found[-1][1]:
            break  # what follows would fail for the same reason
    results.write(json.dumps(found) + "\n")
    results.flush()
    os._exit(0)  # whatever the file has started


def check(exercise: Exercise, module: ModuleType) -> str:
    """Say what is wrong with a function of the reader's module; "" if it is right.

    Args:
        exercise: The exercise.
        module: The reader's module.
    """
    function = getattr(module, exercise.function, None)
    if not callable(function):
        return f"The file has no function {exercise.function}. Write it."
    calls = [*exercise.inputs(), *_real_inputs(exercise)]
    results = []
    for inputs in calls:
        try:
            results.append(function(*copy.deepcopy(inputs)))
        except BaseException as error:  # noqa: BLE001 - also SystemExit and KeyboardInterrupt
            return _raised(error, module)
    expected = [exercise.solution(*inputs) for inputs in calls]
    differences = [difference(one, other) for one, other in zip(results, expected, strict=True)]
    wrong = next((i for i, text in enumerate(differences) if text), None)
    if wrong is None:
        return ""
    text = f"{differences[wrong][0].upper()}{differences[wrong][1:]}."
    for mistake in mistakes_of(exercise.function):
        if _same_results(mistake.wrong, calls, results):
            text = f"{mistake.sentence} ({text})"
            break
    if exercise.function == "forward":
        text += _first_layer(module, calls[wrong])
    return text


def _same_results(wrong: Callable[..., Any], calls: list[tuple[Any, ...]], results: list[Any]) -> bool:
    """Whether a wrong version gives the same results as the reader's."""
    try:
        return all(_same(result, wrong(*inputs)) for inputs, result in zip(calls, results, strict=True))
    except (RuntimeError, ValueError, KeyError, IndexError, StopIteration):  # not made for these inputs
        return False


def _same(result: Any, other: Any) -> bool:
    if isinstance(result, Tensor) and isinstance(other, Tensor) and result.shape == other.shape:
        finite = torch.isfinite(result)
        if not torch.equal(finite, torch.isfinite(other)):
            return False
        return distance(result[finite], other[finite]) <= MAX_DISTANCE
    return equal(result, other) or (isinstance(result, float) and result != result and other != other)


# --- The real model, from chapter 9 on ----------------------------------------------------------


def _real_inputs(exercise: Exercise) -> list[tuple[Any, ...]]:
    """The arguments for SmolLM2, if it has been fetched."""
    if exercise.function != "forward":
        return []
    from llama_scratch.checkpoint import open_checkpoint
    from llama_scratch.download.locate import find_model
    from llama_scratch.precision.lazy_weight import as_tensor
    from llama_scratch.system.progress import silent

    try:
        path = find_model("smollm2")
    except ModelNotFoundError:
        return []
    checkpoint = open_checkpoint(path)
    weights: Mapping[str, Tensor] = {
        name: as_tensor(weight).float() for name, weight in checkpoint.load(silent).items()
    }
    ids = checkpoint.tokenizer.encode("The capital of France is")
    return [(torch.tensor(ids), weights, checkpoint.args)]


def _first_layer(module: ModuleType, inputs: tuple[Any, ...]) -> str:
    """Name the first layer after which the residual stream differs.

    The reader's forward pass runs again with a `block` that records; "" if it does not call `block`.
    """
    ours, theirs = (_streams(each, inputs) for each in (solution, module))
    if len(theirs) != len(ours):
        return ""
    if not equal(theirs[0][0], ours[0][0]):
        return " The embedding differs already."
    for layer, ((_, mine), (_, other)) in enumerate(zip(ours, theirs, strict=True)):
        if not equal(other, mine):
            return f" The first layer that differs is layer {layer}."
    return " All layers are right; what differs comes after them."


def _streams(module: ModuleType, inputs: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    """The residual stream before and after each call of a module's `block`."""
    recorded: list[tuple[Tensor, Tensor]] = []
    block = getattr(module, "block", None)
    if block is None:
        return []

    def recording(x: Tensor, *rest: Any) -> Tensor:
        out: Tensor = block(x, *rest)
        recorded.append((x, out))
        return out

    vars(module)["block"] = recording
    try:
        module.forward(*copy.deepcopy(inputs))
    finally:
        vars(module)["block"] = block
    return recorded


# --- Files that fail ----------------------------------------------------------------------------


def _load(path: Path) -> ModuleType | str:
    """Run the file. Returns a sentence if it fails."""
    spec = importlib.util.spec_from_file_location("my_llama", path)
    if spec is None or spec.loader is None:
        return f"{path.name} is not a Python file."
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as for a script
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # noqa: BLE001 - also SystemExit and KeyboardInterrupt
        return _raised(error, module)
    return module


def _raised(error: BaseException, module: ModuleType) -> str:
    """Say in one sentence what the file raised, and at which line of it."""
    if isinstance(error, SystemExit):
        return "It calls exit. Return the result instead."
    name, said = type(error).__name__, sanitize(error, 200)
    if isinstance(error, SyntaxError):
        return f"Line {error.lineno} is not Python: {said}."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == module.__file__]
    place = f"Line {frames[-1].lineno} raises" if frames else "It raises"
    return f"{place} {name}{': ' + said if said else ''}."


if __name__ == "__main__":
    main()
