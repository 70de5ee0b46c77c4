"""The command line, run in the tests' own process by the fixture `llama_scratch`."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Result(NamedTuple):
    """Exit code and output of a run."""

    code: int
    out: str
    err: str


class Runner(Protocol):
    def __call__(self, *arguments: str, stdin: bytes = b"") -> Result: ...


def one_sentence(result: Result) -> str:
    """Check that the run printed only a one-line error, and return it."""
    assert result.out == ""
    assert result.err.startswith("llama-scratch: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    return result.err
