"""The fingerprint of a checkpoint: the files, their order, and saved sessions in each format."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.convert import convert
from llama_scratch.errors import CheckpointError
from llama_scratch.llama import Llama
from llama_scratch.repl import session_file
from llama_scratch.repl.dispatch import respond
from llama_scratch.system.progress import silent
from tests.helpers import gguf_files
from tests.helpers import meta_files as shards
from tests.helpers.session_files import edited, replayed, saved, session_of

Kept = tuple[Path, list[str]]
"""A model, and the names of its weight files in order."""


def huggingface(tiny: Path, place: Path) -> Kept:
    return convert(tiny, place / "Tiny-HF", "hf").path, ["model.safetensors"]


def huggingface_shards(tiny: Path, place: Path) -> Kept:
    """Two files; the index lists the second one first."""
    path, _ = huggingface(tiny, place)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weights = load_file(path / "model.safetensors")
    parts = [{n: w for i, (n, w) in enumerate(sorted(weights.items())) if i % 2 == part} for part in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, path / name)
    (path / "model.safetensors").unlink()
    places = {weight: names[part] for part in (1, 0) for weight in parts[part]}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path, names


def hub_cache(tiny: Path, place: Path) -> Kept:
    """A snapshot whose files are links to blobs."""
    path, names = huggingface_shards(tiny, place)
    root = place / "models--someone--Tiny"
    snapshot, blobs = root / "snapshots" / "0123abc", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(path.iterdir(), reverse=True)):
        shutil.move(file, blobs / f"{number:040}")
        (snapshot / file.name).symlink_to(blobs / f"{number:040}")
    return snapshot, names


def in_original(tiny: Path, place: Path) -> Kept:
    shutil.copytree(tiny, place / "Tiny" / "original")
    return place / "Tiny", ["consolidated.00.pth"]


def meta(tiny: Path, place: Path) -> Kept:
    return Path(shutil.copytree(tiny, place / "Tiny")), ["consolidated.00.pth"]


def meta_shards(_tiny: Path, place: Path) -> Kept:
    path = shards.write(place / "Four", shards.split(shards.weights_of(), 4))
    return path, [shards.shard(number) for number in range(4)]


def gguf(tiny: Path, place: Path) -> Kept:
    return convert(tiny, place / "tiny.gguf", "gguf").path, ["tiny.gguf"]


def gguf_parts(_tiny: Path, place: Path) -> Kept:
    """Three files, opened by the second one."""
    paths = gguf_files.write(place, gguf_files.cut(6, 8, 6))
    return paths[1], [path.name for path in paths]


EACH = [huggingface, huggingface_shards, hub_cache, in_original, meta, meta_shards, gguf, gguf_parts]


def folder(path: Path) -> Path:
    """The directory of the weight files."""
    if path.is_file():
        return path.parent
    return path / "original" if (path / "original").is_dir() else path


def load(path: Path) -> Llama:
    return Llama.load(path, precision="fp32", device="cpu", context=64)


@pytest.mark.parametrize("make", EACH)
def test_a_fingerprint_covers_all_weight_files(
    make: Callable[[Path, Path], Kept], tiny_dir: Path, tmp_path: Path
) -> None:
    """It equals `cat FILES | sha256sum`, and sessions can be saved, loaded and replayed."""
    path, names = make(tiny_dir, tmp_path)
    expected = hashlib.sha256(b"".join((folder(path) / name).read_bytes() for name in names)).hexdigest()
    assert open_checkpoint(path).fingerprint(silent) == expected
    llama = load(path)
    assert llama.fingerprint() == expected
    file = saved(session_of(llama, "the"), tmp_path / "a.jsonl")
    assert session_file.load(file).header.model.sha256 == expected
    assert respond(session_of(llama), f"/load {file}")[0]["same_model"] is True
    found = replayed(file, llama)
    assert (found.differences, found.notes) == ([], [])


@pytest.mark.parametrize("make", [huggingface_shards, meta_shards, gguf_parts])
def test_each_of_several_files_counts(make: Callable[[Path, Path], Kept], tiny_dir: Path, tmp_path: Path) -> None:
    path, names = make(tiny_dir, tmp_path)
    seen = {open_checkpoint(path).fingerprint(silent)}
    for name in names:
        with (folder(path) / name).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        seen.add(open_checkpoint(path).fingerprint(silent))
    assert len(seen) == 1 + len(names)


def test_it_is_computed_once(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(load(tiny_dir), "the")
    saved(session, tmp_path / "a.jsonl")
    monkeypatch.setattr(os, "pread", None)
    saved(session, tmp_path / "a.jsonl")
    respond(session, f"/load {tmp_path / 'a.jsonl'}")


def test_the_weights_that_answered_count_after_another_file_took_their_name(tiny_dir: Path, tmp_path: Path) -> None:
    path, (name,) = meta(tiny_dir, tmp_path)
    llama = load(path)
    session = session_of(llama, "the")
    before = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "new").write_bytes(b"another model")
    os.replace(path / "new", path / name)
    assert session_file.load(saved(session, tmp_path / "a.jsonl")).header.model.sha256 == before


def test_a_file_that_was_written_to_is_noticed(tiny_dir: Path, tmp_path: Path) -> None:
    path, (name,) = meta(tiny_dir, tmp_path)
    session = session_of(load(path), "the")
    with (path / name).open("r+b") as file:
        file.write(b"X")
    os.utime(path / name, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        saved(session, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def old(lines: list[dict[str, object]]) -> dict[str, object]:
    """A header as written by version 0.1.0."""
    header, *_ = lines
    for name in ("details", "turns", "asked"):
        del header[name]
    del header["end"]["more"]  # type: ignore[attr-defined]
    return header


@pytest.mark.parametrize("make", [meta_shards, gguf_parts])
def test_an_old_checksum_of_one_file_keeps_its_meaning(
    make: Callable[[Path, Path], Kept], tiny_dir: Path, tmp_path: Path
) -> None:
    """Version 0.1.0 hashed only the first of Meta's shards, or the named file of a split GGUF model."""
    path, names = make(tiny_dir, tmp_path)
    file = saved(session_of(load(path), "the"), tmp_path / "a.jsonl")
    first = path if path.is_file() else path / names[0]
    digest = hashlib.sha256(first.read_bytes()).hexdigest()

    def change(lines: list[dict[str, object]]) -> None:
        header = old(lines)
        header["model"]["sha256"] = header["end"]["model"] = digest  # type: ignore[index]

    edited(file, change)
    assert respond(session_of(load(path)), f"/load {file}")[0]["same_model"] is True
    assert replayed(file, load(path)).differences == []
