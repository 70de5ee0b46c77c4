"""Short runs of the memory measurements, and the record of the long run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.checkpoints import TINY_PARAMS, write_meta
from tests.trust import memory
from tests.trust.record import read

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "kernels"), memory.RUNS)
def test_the_peak_is_the_predicted_one(tmp_path: Path, precision: str, *, kernels: bool) -> None:
    """With a full context and 110 M weights, so that the program matters little.

    Freed memory often returns to the system late, so a peak that is too high is measured again. In bf16, about every
    second one is.
    """
    shape = TINY_PARAMS | {"dim": 1024, "n_layers": 8, "n_heads": 16, "n_kv_heads": 8, "multiple_of": 512}
    path = write_meta(tmp_path / "Llama", params=shape)
    for _ in range(10):
        found = memory.peak(path, precision, 1024, kernels=kernels)
        if found["predicted_to_measured"] >= 0.9:
            break
    assert 0.9 <= found["predicted_to_measured"] <= 1.1, found


@pytest.mark.slow
@pytest.mark.usefixtures("built_kernels")
def test_prompts_leave_nothing_behind(tiny_dir: Path) -> None:
    """A leak of 1 KB per prompt would be 600 KB here."""
    found = memory.growth(tiny_dir, "bf16", 1200)
    assert found["grew"] < 300_000, found


@pytest.mark.parametrize(("kind", "sizes"), [("RLIMIT_AS", [200, 430, 520, 600, 900]), ("RLIMIT_DATA", [100, 350])])
def test_a_limit_is_enough_or_a_sentence(tiny_dir: Path, kind: str, sizes: list[int]) -> None:
    """Includes the limits at which importing torch used to crash the program."""
    found = memory.limits(tiny_dir, kind, sizes)
    assert found["findings"] == []


def test_help_needs_no_torch() -> None:
    assert memory.limited("RLIMIT_AS", 200 << 20, "--help") == (0, "")


def test_record_of_the_long_run() -> None:
    found = read("memory")
    assert all(run["prompts"] >= 10_000 for run in found["growth"].values())
    assert memory.sound(found)
