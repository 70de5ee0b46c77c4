"""Warnings of a checkpoint: shown once at loading, and by info, verify and every prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llama_scratch import llama
from llama_scratch.checkpoint import describe, open_checkpoint, verify
from llama_scratch.render.reports import model_facts
from tests.helpers.command_line import Runner

WARNING = "The files contradict each other. The weights take precedence."


@pytest.fixture
def warned(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The option for the small model, which now has a warning."""
    opened = replace(open_checkpoint(tiny_dir), warnings=(WARNING,))
    for module in (llama, describe, verify):
        monkeypatch.setattr(module, "open_checkpoint", lambda *_: opened)
    return ("--model-dir", str(tiny_dir))


def test_it_is_printed_once_and_is_in_every_answer(warned: tuple[str, str], llama_scratch: Runner) -> None:
    """Once on stderr for two prompts, in each JSON object, and never in tab-separated output."""
    lines = llama_scratch(*warned, stdin=b"the cat\nit is\n")
    assert lines.code == 0
    assert lines.err.count(WARNING) == 1
    assert WARNING not in lines.out
    objects = llama_scratch(*warned, "--json", stdin=b"the cat\nit is\n")
    assert objects.err.count(WARNING) == 1
    assert all(WARNING in json.loads(line)["warnings"] for line in objects.out.splitlines())
    assert WARNING not in llama_scratch(*warned, "--quiet", "the cat").err


def test_info_and_verify_show_it(warned: tuple[str, str], tiny_dir: Path, llama_scratch: Runner) -> None:
    """A field of info, and a note of verify, whose exit code stays 0."""
    facts = json.loads(llama_scratch(*warned, "info", "--json").out)
    assert facts["warnings"] == [WARNING]
    assert WARNING in model_facts(facts)["warnings"]
    verified = llama_scratch(*warned, "verify")
    assert verified.code == 0
    assert f"note: consolidated.00.pth: {WARNING}" in verified.out


def test_a_model_without_warnings_has_none(tiny_dir: Path) -> None:
    assert open_checkpoint(tiny_dir).warnings == ()
