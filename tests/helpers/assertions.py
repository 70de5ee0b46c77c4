"""Common checks of errors, time and memory."""

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
    """Check class, exit code and message of an error.

    The message must be one short printable line.

    Args:
        error: The error.
        kind: The exact class; `CheckpointError` also accepts `UnsupportedError`.
        words: Texts that the message must contain.

    Returns:
        The message.
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
    """Run an action that must raise an error, and check it with `is_sentence`.

    Args:
        action: The action.
        error: The expected class.
        words: Texts that the message must contain.
        exact: Whether subclasses of `error` are rejected.

    Returns:
        The message.
    """
    with pytest.raises(error) as caught:
        action()
    return is_sentence(caught.value, error if exact else type(caught.value), *words)


@contextmanager
def little_time_and_memory(seconds: float = 1.0, mebibytes: float = 16.0) -> Iterator[None]:
    """Limit the CPU time and the peak memory of the block."""
    tracemalloc.start()
    start = time.process_time()  # CPU time is independent of other programs
    try:
        yield
        assert time.process_time() - start < seconds
        assert tracemalloc.get_traced_memory()[1] < mebibytes * 2**20
    finally:
        tracemalloc.stop()
