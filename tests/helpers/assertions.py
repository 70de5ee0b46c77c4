"""Checks of errors, time and memory that many tests make."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from llama_scratch.errors import (
    REDOWNLOAD_HINT,
    CheckpointError,
    ContextLengthError,
    LlamaScratchError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedError,
    UsageError,
)

EXIT_CODES = {
    UsageError: 2,
    ContextLengthError: 2,
    ModelNotFoundError: 3,
    CheckpointError: 4,
    UnsupportedError: 4,
    OutOfMemoryError: 5,
}


def is_sentence(error: LlamaScratchError, kind: type[LlamaScratchError], *words: object) -> str:
    """Check an error: its class, its exit code, and one short printable line that holds all `words`; the message.

    kind: the exact class; `CheckpointError` stands for `UnsupportedError` too.
    """
    message = str(error)
    assert type(error) is kind or (kind is CheckpointError and type(error) is UnsupportedError), message
    assert not (isinstance(error, UnsupportedError) and REDOWNLOAD_HINT in message), message
    assert error.exit_code == EXIT_CODES.get(kind, 1)
    assert message.isprintable(), message
    assert message.endswith("."), message
    assert len(message) < 1000
    for word in words:
        assert str(word) in message, message
    return message


def assert_rejected(
    action: Callable[[], object], error: type[LlamaScratchError], *words: object, exact: bool = True
) -> str:
    """Run an action that must fail with such an error, see `is_sentence`; the message.

    exact: or else a class below `error` will do.
    """
    with pytest.raises(error) as caught:
        action()
    return is_sentence(caught.value, error if exact else type(caught.value), *words)


@contextmanager
def little_time_and_memory(seconds: float = 1.0, mebibytes: float = 16.0) -> Iterator[None]:
    """What is inside must end soon and hold little at any moment."""
    tracemalloc.start()
    start = time.process_time()  # which other programs on the machine do not change
    try:
        yield
        assert time.process_time() - start < seconds
        assert tracemalloc.get_traced_memory()[1] < mebibytes * 2**20
    finally:
        tracemalloc.stop()
