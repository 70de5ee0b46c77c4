"""Fuzz every reader briefly, and replay the stored findings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from tests.trust.fuzz import CASES, COUNT, SECONDS, TARGETS, Figures, inputs, problem
from tests.trust.record import read


def fuzz(code: str) -> Any:
    """Run code in a separate process and return its JSON output.

    Fuzzing forks and sets a memory limit, so it needs its own process.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"import dataclasses, json, time\nfrom tests.trust import fuzz\n{code}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def figures() -> Any:
    """Results of a short run of all readers, with fixed inputs."""
    return fuzz("print(json.dumps({name: dataclasses.asdict(fuzz.run(name, 300)) for name in fuzz.TARGETS}))")


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_broken_inputs_are_taken_or_refused_in_a_sentence(figures: Any, name: str) -> None:
    """Within the deadline and the memory limit, and without a crash."""
    found = figures[name]
    assert found["findings"] == []
    assert found["inputs"] == found["taken"] + found["refused"] == 300
    assert found["slowest_s"] < SECONDS


@pytest.mark.parametrize("case", sorted(CASES.iterdir()), ids=lambda path: path.name)
def test_what_was_found_stays_mended(case: Path) -> None:
    """Each stored input is accepted, or rejected with a message."""
    target = TARGETS[case.name.partition("-")[0].replace("_", " ")]
    with tempfile.TemporaryDirectory() as folder:
        assert problem(target, case.read_bytes(), Path(folder) / target.file, Figures()) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reader", "found"),
    [
        ("raise ValueError('planted')", "ValueError: planted"),
        ("raise fuzz.LlamaScratchError('two\\nlines.')", "without a proper message"),
        ("while True: pass", "longer than 1 s"),
        ("bytearray(1 << 30)", "more than 128 MB"),
        ("x = bytearray(30 << 20)", "objects take 31,"),
        ("__import__('os').abort()", "ends the process with -6"),
        ("time.sleep(99)", "hangs for more than 6 s outside of Python"),
    ],
)
def test_a_planted_fault_is_found(reader: str, found: str) -> None:
    """Each kind of fault; the valid files are read without one."""
    code = f"""
import pathlib, tempfile
fuzz.CASES, fuzz.STALLED, fuzz.SAMPLE = pathlib.Path(tempfile.mkdtemp()), 6.0, 1
def read(path):
    if path.read_bytes() not in seeds:
        {reader}
seeds = fuzz._history_seeds(pathlib.Path(tempfile.mkdtemp()))
fuzz.TARGETS["history"] = fuzz.Target(lambda _: seeds, fuzz.change_bytes, read, "history")
print(json.dumps(fuzz.run("history", 1).findings))
"""
    findings = fuzz(code)
    assert findings
    assert all(found in finding for finding in findings), findings


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_are_made_of_their_number_alone(name: str, tmp_path: Path) -> None:
    """Inputs are reproducible from their number, and most are not valid files."""
    seeds = TARGETS[name].seeds(tmp_path)
    once, again = (list(inputs(name, seeds, 0, 0, 40, 1)) for _ in range(2))
    assert once == again
    assert sum(data not in seeds for _, data in once) > 20
    assert once != list(inputs(name, seeds, 1, 0, 40, 1))


@pytest.mark.parametrize("name", read("fuzz")["targets"])
def test_the_long_runs_figures(name: str) -> None:
    """The promised number of inputs, and no findings."""
    found = read("fuzz")["targets"][name]
    assert found["inputs"] == found["taken"] + found["refused"] == COUNT
    assert found["findings"] == []
