"""Hessians of every linear layer, against independent hooks, and the calibration examples."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_scratch import Llama
from llama_scratch.errors import ModelNotFoundError, UsageError
from llama_scratch.precision import calibration
from llama_scratch.precision.calibration import (
    collect_hessians,
    examples,
    read_text,
    sample_model_text,
    stdlib_documentation,
    windows,
)
from llama_scratch.precision.lazy_weight import as_tensor
from llama_scratch.precision.linear import PackedLinear, format_of
from llama_scratch.precision.rows import Rows


@pytest.fixture(scope="module")
def llama(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32")


def some_windows(llama: Llama) -> list[Tensor]:
    """A single window and a batch of two with another length."""
    ids = torch.randint(llama.args.vocab_size, (80,), generator=torch.Generator().manual_seed(0))
    return [ids[:20].view(1, 20), ids[20:].view(2, 30)]


def test_hessians(llama: Llama) -> None:
    """E[x xᵀ] for every linear layer over all windows; each layer occurs once, and the network is unchanged."""
    model, some = llama.engine.model, some_windows(llama)
    seen: dict[str, list[Tensor]] = {}
    linear = {name: module for name, module in model.named_modules() if format_of(module)}
    assert len(linear) == 3 * 7 + 1
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0].flatten(0, 1)))
        for name, module in linear.items()
    ]
    for window in some:
        model(window, all_positions=True)
    for hook in hooks:
        hook.remove()
    found = {name: (products, names) for names, products in collect_hessians(model, some) for name in names}
    assert found.keys() == linear.keys()
    for name, (products, names) in found.items():
        x = torch.cat(seen[name]).double()
        expected = x.T @ x / 80
        assert float((products - expected).norm() / expected.norm()) < 1e-5, name
        assert products is found[names[0]][0]
    assert found["layers.1.attention.wk"][0] is found["layers.1.attention.wq"][0]
    assert found["layers.1.feed_forward.w3"][0] is found["layers.1.feed_forward.w1"][0]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_an_interrupt(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks are removed after any exception."""
    model = llama.engine.model

    def interrupted(*_: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "_forward_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(collect_hessians(model, some_windows(llama)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_the_model_says(llama: Llama) -> None:
    """Texts are sampled from the model after the start and a random token each, and are deterministic."""
    said = sample_model_text(llama.engine.model, 3, [7, 9])
    assert said.shape == (3, 256)
    assert said[:, :2].tolist() == [[7, 9]] * 3
    assert len(set(said[:, 2].tolist())) == 3
    assert torch.equal(said, sample_model_text(llama.engine.model, 3, [7, 9]))
    # A model with all probability on one token always samples the most probable continuation.
    model = Llama.load(llama.path, precision="fp32").engine.model
    form = format_of(model.output)
    assert isinstance(form, Rows)
    weight = as_tensor(form.weights[0])
    model.output = PackedLinear(Rows([weight * 1e6]))  # type: ignore[assignment]
    sure = sample_model_text(model, 2)
    following = model(sure, all_positions=True).argmax(-1)
    assert torch.equal(following[:, :-1], sure[:, 1:])


def test_documentation() -> None:
    """Text of the standard library with the requested length, always the same, and without benchmark data."""
    from pydoc_data.topics import topics

    text = stdlib_documentation(100_000)
    assert len(text) == 100_000
    assert text == stdlib_documentation(200_000)[:100_000]
    assert stdlib_documentation(0) == ""
    assert text.count(" the ") > 500
    paragraphs = {part for topic in topics.values() for part in topic.split("\n\n") if len(part) > 100}
    assert sum(part in text for part in paragraphs) == 0


def test_documentation_without_the_librarys_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty without source files. Files that are not valid Python are skipped."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert stdlib_documentation(1000) == ""
    (tmp_path / "a.py").write_text('"""' + "words " * 100 + '"""')
    (tmp_path / "b.py").write_text("def (")
    (tmp_path / "c.py").write_bytes(b"\0\xff")
    (tmp_path / "d.py").write_text('"""short"""')
    assert stdlib_documentation(1000) == "words " * 100


@pytest.mark.slow
def test_examples(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half documentation, half sampled text; each window starts with the BOS token."""
    bos = llama.tokenizer.bos_id
    assert bos is not None
    read, *rest = found = examples(llama.engine.model, llama.tokenizer, tokens=2048)
    assert [window.shape for window in found] == [(1, 1024), (4, 256)]
    assert all(bool((window[:, 0] == bos).all()) for window in found)
    text = llama.tokenizer.decode(read[0, 1:].tolist())
    assert stdlib_documentation(10_000).startswith(text[:500])
    assert torch.equal(rest[0], sample_model_text(llama.engine.model, 4, [bos]))
    monkeypatch.setattr(calibration, "stdlib_documentation", lambda _: "")
    assert [window.shape for window in examples(llama.engine.model, llama.tokenizer, tokens=1000)] == [(4, 256)]


def test_windows_of_a_text(llama: Llama) -> None:
    """Whole windows, at most the requested number. A text shorter than one window is rejected."""
    ids = llama.tokenizer.encode(text := stdlib_documentation(50_000))
    found = windows(llama.tokenizer, text, tokens=2048)
    assert [window.shape for window in found] == [(1, 1024), (1, 1024)]
    assert found[0][0, 1:].tolist() + found[1][0, 1:].tolist() == ids[: 2 * 1023]
    assert len(windows(llama.tokenizer, text, tokens=10**9)) == len(ids) // 1023
    with pytest.raises(UsageError, match=r"shorter than 1,024 tokens"):
        windows(llama.tokenizer, "Too short.")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a\né".encode(), "a\né"),
        (b"\xef\xbb\xbfa", "a"),
        (b"a\r\nb\rc", "a\nb\nc"),
        (b"<html>", "<html>"),
        ("é".encode() * 2_000_000, "é" * (32 * 16_384)),
        (b"a" + "é".encode() * 2_000_000, "a" + "é" * (32 * 16_384 - 1)),
    ],
    ids=["plain", "mark", "line ends", "a page", "long", "cut within a character"],
)
def test_a_file_to_calibrate_with(tmp_path: Path, content: bytes, text: str) -> None:
    """The byte order mark is removed, and only the beginning of a long file is read."""
    (tmp_path / "text").write_bytes(content)
    assert read_text(tmp_path / "text") == text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a".encode("utf-16"), "UTF-16"),
        (b"caf\xe9", "UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"ab" + bytes(9), "zero bytes"),
    ],
)
def test_a_file_that_is_not_text(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UsageError, match=says):
        read_text(tmp_path / "text")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_what_cannot_be_calibrated_with(tmp_path: Path) -> None:
    """Reading does not block on a pipe, and a device or a sparse 20 GB file does not fill the memory."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(20 << 30)
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "sparse"):
        with pytest.raises(UsageError, match=path.name):
            read_text(path)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ModelNotFoundError, match=path.name):
            read_text(path)
