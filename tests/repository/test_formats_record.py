"""Recorded comparison with llama.cpp on the same GGUF files.

`python -m benchmarks.formats` records it; it needs a build of llama.cpp.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.formats import KINDS
from benchmarks.report import FOLDER


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "formats.json").read_text())
    return found


def test_what_convert_writes(recorded: dict[str, Any]) -> None:
    """Equal tokens always, and equal logits if llama.cpp uses float32."""
    rows = recorded["convert"]
    assert len(rows) == 7
    for row in rows:
        assert row["unequal_texts"] == 0
        assert row["texts"] >= 30
        assert row["positions"] == 256
        # llama.cpp rounds activations to the dtype of the weights.
        half = "float16" in row["model"]
        assert row["relative_l2"] < (0.1 if half else 1e-3)
        assert row["same_top"] > (0.85 if half else 0.999)


def test_every_type(recorded: dict[str, Any]) -> None:
    """SmolLM2 in each type; llama.cpp rounds activations for quantized types."""
    assert [row["kind"] for row in recorded["types"]] == list(KINDS)
    for row in recorded["types"]:
        assert row["positions"] >= 200
        assert row["unequal_texts"] == 0
        plain = row["kind"] in ("F32", "F16", "BF16")
        assert row["same_top"] >= (0.999 if plain else 0.94)
        assert row["mean_kl"] < (1e-4 if plain else 1e-2)
    stored = {name for row in recorded["types"] for name in row["types"]}
    assert stored == {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}


def test_tokens(recorded: dict[str, Any]) -> None:
    """All texts have the same token ids."""
    assert [row["vocabulary"] for row in recorded["tokens"]] == ["SmolLM2", "Llama 3"]
    for row in recorded["tokens"]:
        assert row["texts"] >= 10_000
        assert row["corpus"] > 2000
        assert row["unequal_texts"] == row["unequal_corpus"] == 0
