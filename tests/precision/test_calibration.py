"""The inputs of every linear layer, against those that hooks of a test's own see; the examples they come from."""

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
    """One alone and two beside each other, of other lengths."""
    ids = torch.randint(llama.args.vocab_size, (80,), generator=torch.Generator().manual_seed(0))
    return [ids[:20].view(1, 20), ids[20:].view(2, 30)]


def test_hessians(llama: Llama) -> None:
    """E[x xᵀ] of every linear layer, of all windows together, and each layer once; the network is left as it was."""
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
    """Whatever ends it."""
    model = llama.engine.model

    def interrupted(*_: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "_forward_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(collect_hessians(model, some_windows(llama)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_the_model_says(llama: Llama) -> None:
    """Drawn by its own probabilities, behind a start and a random token each; the same every time."""
    said = sample_model_text(llama.engine.model, 3, [7, 9])
    assert said.shape == (3, 256)
    assert said[:, :2].tolist() == [[7, 9]] * 3
    assert len(set(said[:, 2].tolist())) == 3
    assert torch.equal(said, sample_model_text(llama.engine.model, 3, [7, 9]))
    # A model that is sure of everything says what is most probable, each time by all that came before.
    model = Llama.load(llama.path, precision="fp32").engine.model
    form = format_of(model.output)
    assert isinstance(form, Rows)
    weight = as_tensor(form.weights[0])
    model.output = PackedLinear(Rows([weight * 1e6]))  # type: ignore[assignment]
    sure = sample_model_text(model, 2)
    following = model(sure, all_positions=True).argmax(-1)
    assert torch.equal(following[:, :-1], sure[:, 1:])


def test_documentation() -> None:
    """Prose of the standard library, as much as was asked for, the same each time; not what benchmarks measure with."""
    from pydoc_data.topics import topics

    text = stdlib_documentation(100_000)
    assert len(text) == 100_000
    assert text == stdlib_documentation(200_000)[:100_000]
    assert stdlib_documentation(0) == ""
    assert text.count(" the ") > 500
    paragraphs = {part for topic in topics.values() for part in topic.split("\n\n") if len(part) > 100}
    assert sum(part in text for part in paragraphs) == 0


def test_documentation_without_the_librarys_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing where there are no files, and files that are no Python are passed over."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert stdlib_documentation(1000) == ""
    (tmp_path / "a.py").write_text('"""' + "words " * 100 + '"""')
    (tmp_path / "b.py").write_text("def (")
    (tmp_path / "c.py").write_bytes(b"\0\xff")
    (tmp_path / "d.py").write_text('"""short"""')
    assert stdlib_documentation(1000) == "words " * 100


@pytest.mark.slow
def test_examples(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them read and half said; the beginning of a text stands before each."""
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
    """Whole ones, no more than asked for; a text with less than one is refused."""
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
    """Its text without a byte order mark; of a long one the beginning, which is all that is used."""
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
    """A pipe is not waited for, a device and a sparse file of 20 GB take no memory."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(20 << 30)
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "sparse"):
        with pytest.raises(UsageError, match=path.name):
            read_text(path)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ModelNotFoundError, match=path.name):
            read_text(path)
