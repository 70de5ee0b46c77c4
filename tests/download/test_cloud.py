"""Models at gs://, downloaded with the real blobfile from a local Google Cloud Storage server."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.download.cloud import local_copy, remote_address
from llama_scratch.download.locate import find_model
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError
from llama_scratch.system.progress import silent
from llama_scratch.tokenizer import Tokenizer
from tests.helpers.assertions import assert_rejected
from tests.helpers.cloud_storage import Pool, Storage
from tests.helpers.loopback import Answer, serving

AT = "gs://bucket/models/Tiny-Llama"
WEIGHTS = random.Random(0).randbytes(700_000)


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A bucket with one model in Meta's format."""
    monkeypatch.setenv("BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH", "1")
    monkeypatch.setattr("llama_scratch.download.cloud._RETRIES", 1)
    with serving() as server:
        pool = Pool(server.url)
        monkeypatch.setattr("blobfile._common.global_pool_director.get_http_pool", lambda: pool)
        storage = Storage(server)
        for name, data in {"params.json": b"{}", "tokenizer.model": b"IQ== 0\n", "notes.txt": b"x"}.items():
            storage.put(f"models/Tiny-Llama/{name}", data)
        storage.put("models/Tiny-Llama/consolidated.00.pth", WEIGHTS)
        yield storage


def cached() -> set[str]:
    """The names of all files in the cache, without the folders above them."""
    root = Path.home() / "cache/llama-scratch/remote"
    return {path.name for path in root.rglob("*") if path.is_file()}


def test_a_model_comes_once(storage: Storage) -> None:
    """Weights stay in the cache; small files are read each time; unrelated files never."""
    path = local_copy(AT, silent)
    assert path.name == "Tiny-Llama"
    assert {file.name for file in path.iterdir()} == {"params.json", "tokenizer.model", "consolidated.00.pth"}
    assert (path / "consolidated.00.pth").read_bytes() == WEIGHTS
    assert "notes.txt" not in storage.fetched()
    storage.server.requests.clear()
    storage.put("models/Tiny-Llama/params.json", b'{"dim": 1}')
    assert local_copy(AT, silent) == path
    assert (path / "params.json").read_bytes() == b'{"dim": 1}'
    assert set(storage.fetched()) == {"params.json", "tokenizer.model"}


def test_other_weights_come_again(storage: Storage) -> None:
    """A new time, size or checksum is a new version. The old one is removed."""
    first = local_copy(AT, silent)
    storage.put("models/Tiny-Llama/consolidated.00.pth", WEIGHTS[::-1])
    second = local_copy(AT, silent)
    assert second != first
    assert second.name == "Tiny-Llama"
    assert (second / "consolidated.00.pth").read_bytes() == WEIGHTS[::-1]
    assert not first.exists()


def test_a_file_that_was_removed(storage: Storage) -> None:
    """It is removed from the cache too."""
    storage.put("models/Tiny-Llama/checklist.chk", f"{'0' * 32}  consolidated.01.pth\n".encode())
    storage.remove("models/Tiny-Llama/checklist.chk")
    storage.put("models/Tiny-Llama/README.md", b"x")
    path = local_copy(AT, silent)
    assert (path / "README.md").exists()
    storage.remove("models/Tiny-Llama/README.md")
    assert local_copy(AT, silent) == path
    assert not (path / "README.md").exists()


def test_the_progress(storage: Storage) -> None:
    """The total covers all weight files."""
    storage.put("models/Tiny-Llama/consolidated.01.pth", WEIGHTS)
    seen: list[tuple[str, int, int]] = []
    local_copy(AT, lambda *report: seen.append(report))
    fetched = [(done, total) for stage, done, total in seen if stage == "fetching"]
    assert fetched == sorted(fetched)
    assert fetched[-1] == (1_400_000, 1_400_000)


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_hugging_face_directory(storage: Storage, weights: str) -> None:
    """Config and tokenizer next to safetensors."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", weights):
        storage.put(f"hf/Some-Model/{name}", name.encode())
    path = local_copy("gs://bucket/hf/Some-Model", silent)
    assert {file.name for file in path.iterdir()} == {"config.json", "tokenizer.json", "tokenizer_config.json", weights}


def test_a_directory_with_original_inside(storage: Storage) -> None:
    """The model keeps the name of the parent directory."""
    for name in ("params.json", "tokenizer.model", "consolidated.00.pth"):
        storage.put(f"x/Llama-3.2-1B/original/{name}", name.encode())
    storage.put("x/Llama-3.2-1B/README.md", b"x")
    path = local_copy("gs://bucket/x/Llama-3.2-1B", silent)
    assert path.parts[-2:] == ("Llama-3.2-1B", "original")
    assert (path / "consolidated.00.pth").read_bytes() == b"consolidated.00.pth"


def test_a_gguf_file(storage: Storage) -> None:
    """The address of a .gguf file."""
    storage.put("x/Some-Model.Q8_0.gguf", WEIGHTS)
    path = local_copy("gs://bucket/x/Some-Model.Q8_0.gguf", silent)
    assert path.name == "Some-Model.Q8_0.gguf"
    assert path.read_bytes() == WEIGHTS
    storage.server.requests.clear()
    assert local_copy("gs://bucket/x/Some-Model.Q8_0.gguf", silent) == path
    assert storage.fetched() == {}


def test_it_is_found_and_opens(storage: Storage, tiny_dir: Path) -> None:
    """A real, small model, by its address or by a `Path`, which drops a slash. It keeps its name."""
    for file in tiny_dir.iterdir():
        storage.put(f"x/Tiny-Instruct/{file.name}", file.read_bytes())
    path = find_model("gs://bucket/x/Tiny-Instruct")
    assert path == find_model(Path("gs://bucket/x/Tiny-Instruct"))
    assert open_checkpoint(path).name == "Tiny-Instruct"
    here, there = Llama.load(tiny_dir), Llama.load("gs://bucket/x/Tiny-Instruct")
    assert here.predict("x").next == there.predict("x").next
    tokenizer = Tokenizer.from_meta("gs://bucket/x/Tiny-Instruct/tokenizer.model")
    assert tokenizer.n_vocab == there.tokenizer.n_vocab


# --- Errors -----------------------------------------------------------------------------------


def test_an_interrupted_copy_goes_on(storage: Storage) -> None:
    """From the byte at which it was interrupted."""
    storage.put("models/Tiny-Llama/consolidated.00.pth", WEIGHTS * 20)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "fetching":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local_copy(AT, interrupt)
    assert "consolidated.00.pth" not in cached()
    assert "consolidated.00.pth.part" in cached()
    storage.server.requests.clear()
    path = local_copy(AT, silent)
    assert (path / "consolidated.00.pth").read_bytes() == WEIGHTS * 20
    ranges = storage.server.ranges("/media/models/Tiny-Llama/consolidated.00.pth")
    assert ranges[0].startswith(f"bytes={1 << 22}-")
    assert "consolidated.00.pth.part" not in cached()


def test_a_dropped_connection(storage: Storage) -> None:
    """blobfile retries."""
    file = storage.put("models/Tiny-Llama/consolidated.00.pth", WEIGHTS)
    file.drops = [300_000]
    assert (local_copy(AT, silent) / "consolidated.00.pth").read_bytes() == WEIGHTS


@pytest.mark.parametrize("content", [WEIGHTS[:-1], WEIGHTS[::-1]])
def test_weights_that_are_not_what_the_store_says(storage: Storage, content: bytes) -> None:
    """A wrong size or MD5: the file is deleted."""
    storage.put("models/Tiny-Llama/consolidated.00.pth", WEIGHTS).data = content
    assert_rejected(lambda: local_copy(AT, silent), CheckpointError, f"{AT}/consolidated.00.pth", "deleted")
    assert not any("consolidated" in name for name in cached())


def test_the_checklist_decides_where_the_store_has_no_checksum(storage: Storage) -> None:
    """Composite objects do not have an MD5."""
    storage.put("models/Tiny-Llama/consolidated.00.pth", WEIGHTS, md5Hash="")
    for data, whole in ((WEIGHTS[::-1], False), (WEIGHTS, True)):
        checklist = f"{hashlib.md5(data).hexdigest()}  ./consolidated.00.pth\n".encode()
        storage.put("models/Tiny-Llama/checklist.chk", checklist)
        if whole:
            local_copy(AT, silent)
        else:
            assert_rejected(lambda: local_copy(AT, silent), CheckpointError, "MD5")


def test_a_small_file_that_is_large(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read up to the limit."""
    monkeypatch.setattr("llama_scratch.download.cloud._MAX_SMALL", 1000)
    storage.put("models/Tiny-Llama/tokenizer.model", bytes(1001))
    assert_rejected(lambda: local_copy(AT, silent), CheckpointError, "tokenizer.model", "1,000")


def test_no_room(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before the weights are downloaded."""
    monkeypatch.setattr("llama_scratch.download.http.shutil.disk_usage", lambda _: Room())
    assert_rejected(lambda: local_copy(AT, silent), LlamaScratchError, "0.0 GB of free space")
    assert "consolidated.00.pth" not in storage.fetched()


class Room:
    """The usage of a full disk."""

    free = 1000


@pytest.mark.parametrize(
    "address", ["gs://bucket/nothing", "gs://bucket/nothing.gguf", "gs://bucket/models", "gs://bucket/x/.."]
)
def test_nothing_there(storage: Storage, address: str) -> None:
    """The error contains the address as given."""
    assert_rejected(lambda: local_copy(address, silent), ModelNotFoundError, address)


@pytest.mark.parametrize("status", [401, 403, 400])
def test_a_store_that_refuses(storage: Storage, status: int, capfd: pytest.CaptureFixture[str]) -> None:
    """The error has the address, the reason and how to log in; blobfile prints nothing."""
    storage.server.files.clear()
    storage.server.otherwise = Answer(status, b"{}")
    assert_rejected(lambda: local_copy(AT, silent), LlamaScratchError, AT, str(status), "gcloud auth", "az login")
    assert capfd.readouterr() == ("", "")


def test_no_connection(storage: Storage, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives up after some retries, and blobfile prints nothing."""
    with serving() as other:
        pool = Pool(other.url)
    monkeypatch.setattr("blobfile._common.global_pool_director.get_http_pool", lambda: pool)
    assert_rejected(lambda: local_copy(AT, silent), LlamaScratchError, AT)
    assert capfd.readouterr() == ("", "")


# --- Addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("gs://bucket/a", "gs://bucket/a"),
        ("gs://bucket/a/", "gs://bucket/a"),
        ("gs:/bucket/a", "gs://bucket/a"),
        ("az://account/container/a", "az://account/container/a"),
        ("gs://", None),
        ("gs:///x", None),
        ("s3://bucket/a", None),
        ("./gs://x", None),
        ("/gs/x", None),
        ("", None),
    ],
)
def test_addresses(given: str, address: str | None) -> None:
    """gs:// and az://, also with the slash that a `Path` drops."""
    assert remote_address(given) == address


@pytest.mark.parametrize("name", ["a b", "...x", "ä", "a\n", "a;b"])
def test_an_odd_name_stays_in_the_cache(storage: Storage, name: str) -> None:
    """The last part of an address becomes a valid folder name."""
    for file in ("params.json", "consolidated.00.pth"):
        storage.put(f"x/{name}/{file}", b"{}")
    path = local_copy(f"gs://bucket/x/{name}", silent).resolve()
    assert path.parent.parent == Path.home() / "cache/llama-scratch/remote"
    assert re.fullmatch(r"\w[\w.-]*", path.name)
