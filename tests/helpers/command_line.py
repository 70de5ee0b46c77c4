"""The command line as tests run it in their own process: see the fixture `llama_scratch`."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Result(NamedTuple):
    """What a run gave."""

    code: int
    out: str
    err: str


class Runner(Protocol):
    def __call__(self, *arguments: str, stdin: bytes = b"") -> Result: ...


def one_sentence(result: Result) -> str:
    """The error of a run that printed nothing else."""
    assert result.out == ""
    assert result.err.startswith("llama-scratch: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    return result.err
