"""A short version of the determinism run, from cold starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.trust import determinism
from tests.trust.record import read
from tests.trust.soak import small_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("determinism") / "Tiny-Llama")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_pipe_and_library_give_the_same_bytes(model: str) -> None:
    """int8 with seeded continuations: two processes, and two new models here."""
    options = ("--json", "--generate", "8", *determinism.OPTIONS)
    first, second = (determinism.pipe(model, "int8", *options) for _ in range(2))
    here, again = (determinism.library(model, "int8") for _ in range(2))
    assert first == second
    assert here == again
    assert here[0][0] == first[0]  # the library and the pipe give exactly the same numbers
    assert {json.loads(line)["model"]["precision"] for line in first} == {"int8"}


def test_text_in_a_pipe_is_the_same(model: str) -> None:
    first, second = (determinism.pipe(model, "fp16", "--top", "5") for _ in range(2))
    assert first == second
    assert len(first) == 5 * len(determinism.LINES)


def test_session_shows_the_same(model: str, tmp_path: Path) -> None:
    first, second = (determinism.session(model, "int8", tmp_path / str(n)) for n in range(2))
    assert first == second
    assert "entropy" in first


def test_after_prefix_reuse_logits_agree_with_a_cold_run(model: str) -> None:
    assert determinism.after_reuse(model) <= 1e-5


def test_record_of_the_long_run() -> None:
    found = read("determinism")
    assert found["processes"] >= 20
    assert set(found["different_outputs"].values()) == {1}
    assert found["after_prefix_reuse"] <= 1e-5
    assert found["kernels"]
    assert found["after_prefix_reuse_int8"] == 0
