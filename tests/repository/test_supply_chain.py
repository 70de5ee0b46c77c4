"""Dependencies: minimum versions, and a complete and consistent lock file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llama_scratch.cli import run
from llama_scratch.download import pypi
from llama_scratch.errors import LlamaScratchError
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "tools" / "lock.txt").read_text()
# One entry per package, with its hashes.
ENTRIES = [entry for entry in re.split(r"\n(?=[a-z])", re.sub(r"(?m)^#.*\n", "", LOCK)) if entry.strip()]
LOCKED: dict[str, list[str]] = {}
for entry in ENTRIES:
    found = Requirement(entry.split(" \\\n")[0])
    LOCKED.setdefault(canonicalize_name(found.name), []).append(str(found.specifier).removeprefix("=="))
DIRECT = [
    *PROJECT["dependencies"],
    *(line for extra in ("plot", "hub", "test") for line in PROJECT["optional-dependencies"][extra]),
]


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_what_the_program_needs_has_a_minimum(line: str) -> None:
    assert any(part.operator in (">=", "==") for part in Requirement(line).specifier), line


def test_torch_is_within_the_range_that_was_tested() -> None:
    """Older versions run code from weights (CVE-2026-24747).

    Quantized tensors are deprecated in newer versions.
    """
    torch = next(Requirement(line) for line in PROJECT["dependencies"] if line.startswith("torch"))
    assert {part.operator for part in torch.specifier} == {">=", "<"}
    assert not torch.specifier.contains("2.9.1")


@pytest.mark.parametrize("line", DIRECT)
def test_the_lock_holds_each_direct_dependency_within_its_range(line: str) -> None:
    requirement = Requirement(line)
    name = canonicalize_name(requirement.name)
    if name == "torch":  # its build depends on the machine
        assert name not in LOCKED
    else:
        assert LOCKED[name]
        assert all(requirement.specifier.contains(version) for version in LOCKED[name])


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.split()[0])
def test_each_locked_file_has_its_checksum(entry: str) -> None:
    assert re.search(r"^    --hash=sha256:[0-9a-f]{64}", entry, re.MULTILINE)


def test_the_lock_names_no_place() -> None:
    """Each machine's pip configuration decides the package index."""
    assert "://" not in LOCK
    assert "index-url" not in LOCK


def test_the_license_of_the_open_model_is_shown_before_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    def no_connection(*_: object) -> Path:
        shown.append(capsys.readouterr().err)
        raise LlamaScratchError("there is no connection.")

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(pypi, "_download", no_connection)
    assert run(["pull", "smollm2"]) == 1
    assert "license: Apache-2.0" in shown[0]


def test_whose_license_metas_link_is_for_is_shown_before_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", "Llama3.2-1B", "--from-url", "no link"]) == 2
    assert "Meta's license" in capsys.readouterr().err
