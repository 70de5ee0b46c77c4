"""Fixtures for the tests of precisions."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_scratch.precision import kernels
from tests.helpers import KERNELS


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation of products: kernels, or torch's operators."""
    if request.param == "kernels":
        request.getfixturevalue("built_kernels")
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", KERNELS if request.param == "kernels" else "0")
    assert kernels.ready() == (request.param == "kernels")
    return str(request.param)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The weight file that packed weights are cached for."""
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path
