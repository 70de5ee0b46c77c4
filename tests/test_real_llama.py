"""Llama 3.2 1B itself, if it is available: its license does not allow adding it to this repository."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from llama_scratch.llama import Llama

VARIABLE = "LLAMA_SCRATCH_TEST_MODEL_DIR"
SHA256 = "cfa47fb7185ebd1c3712fff5fa04fdbb0675c1e345fc72e12f6c7b65b8da6f05"


@pytest.fixture(scope="module")
def directory() -> Path:
    """Directory of the Llama 3.2 1B base model in Meta's format."""
    if not (named := os.environ.get(VARIABLE)):
        pytest.skip(f"{VARIABLE} is not set; set it to Meta's directory of Llama 3.2 1B to run this.")
    return Path(named)


def test_the_weights_are_those_that_meta_published(directory: Path) -> None:
    """The other tests in this file depend on this."""
    with (directory / "consolidated.00.pth").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256


def test_the_real_model_knows_the_capital_of_france(directory: Path) -> None:
    """The number of parameters counts the tied output once."""
    llama = Llama.load(directory)
    assert llama.info.parameters == 1_235_814_400
    assert llama.predict("The capital of France is").next.text == " Paris"
