"""Models from the Hugging Face Hub: downloaded from a local test server, then found without a network."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from llama_scratch.cli import run
from llama_scratch.download.http import RetryPolicy
from llama_scratch.download.hub import Repository, pull_hub
from llama_scratch.download.locate import find_model
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError
from llama_scratch.system.progress import silent
from tests.helpers.assertions import assert_rejected
from tests.helpers.loopback import HTML, Answer, File, Server, serving, wait_for

ID, COMMIT, OTHER = "some-org/Tiny-Llama", "a" * 40, "b" * 40
QUICK = RetryPolicy(timeout=0.3, tries=3, pause=0.001)
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"x": 1}',
    "tokenizer_config.json": b'{"y": 1}',
    "special_tokens_map.json": b'{"z": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"---\nlicense: mit\n---\n",
    "LICENSE.txt": b"the license",
}
UNWANTED = {
    ".gitattributes": b"a",
    "pytorch_model.bin": b"b" * 50,
    "original/consolidated.00.pth": b"c" * 50,
    "original/params.json": b"{}",
    "original/tokenizer.model": b"t",
    "onnx/model.onnx": b"d",
    "model.fp16.safetensors": b"e" * 50,
    "adapter_model.safetensors": b"f" * 50,
    "consolidated.safetensors": b"g" * 50,
    "train.py": b"h",
}
WEIGHTS = random.Random(0).randbytes(700_000)


class Hub:
    """A test server that acts as the hub for one repository."""

    def __init__(self, server: Server):
        self.server = server
        server.otherwise = Answer(404, headers={"X-Error-Code": "RepoNotFound"})
        self.card: dict[str, Any] = {"license": "llama3.2"}
        self.files: dict[str, File] = {}

    def offer(self, files: dict[str, bytes], revision: str = "main", commit: str = COMMIT) -> None:
        """Serve the files of a revision: weights by their SHA-256 (LFS), others by their git hash."""
        siblings = []
        for name, data in files.items():
            sha256, large = hashlib.sha256(data).hexdigest(), name.endswith((".safetensors", ".pth", ".bin", ".gguf"))
            blob = hashlib.sha1(data).hexdigest()
            entry = {"rfilename": name, "size": len(data), "blobId": blob}
            siblings.append(entry | ({"lfs": {"sha256": sha256, "size": len(data), "pointerSize": 9}} if large else {}))
            headers = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(data))}
            file = File(data, etag=f'"{sha256 if large else blob}"', headers=headers)
            self.files[name] = file
            for place in (commit, revision):
                self.server.files[f"/{ID}/resolve/{place}/{name}"] = file
        info = {"id": ID, "sha": commit, "siblings": siblings, "cardData": self.card, "gated": False, "private": False}
        for place in (commit, revision):
            body = json.dumps(info).encode()
            headers = {"Content-Type": "application/json"}
            self.server.files[f"/api/models/{ID}/revision/{place}"] = Answer(200, body, headers)

    def asked(self) -> set[str]:
        """Names of the files whose content was requested."""
        marker = "/resolve/"
        paths = [path for method, path, _ in self.server.requests if method == "GET" and marker in path]
        return {path.split(marker)[1].partition("/")[2] for path in paths}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository, and an empty cache in the home directory."""
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(Path.home() / "token"))
        for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        hub = Hub(server)
        hub.offer({**SMALL, "model.safetensors": WEIGHTS, **UNWANTED})
        yield hub


def pull(name: str = ID, said: list[str] | None = None) -> Path:
    repository = Repository.named(name)
    assert repository
    return pull_hub(repository, silent, (said if said is not None else []).append, QUICK)


def cache() -> Path:
    return Path.home() / "cache/huggingface/hub"


def snapshot(commit: str = COMMIT) -> Path:
    return cache() / "models--some-org--Tiny-Llama/snapshots" / commit


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- Downloads --------------------------------------------------------------------------------


def test_only_what_is_needed(hub: Hub) -> None:
    """Config, tokenizer, template, license and safetensors; nothing from `original/`."""
    said: list[str] = []
    assert pull(said=said) == snapshot()
    assert names(snapshot()) == {*SMALL, "model.safetensors"} == hub.asked()
    assert (snapshot() / "model.safetensors").read_bytes() == WEIGHTS
    assert said == [f"{ID}: 0.0007 GB, license: llama3.2"]


def test_the_license_comes_before_the_weights(hub: Hub) -> None:
    """The license is printed before any file is requested."""
    for card, license in (({"license": "other", "license_name": "my-own"}, "my-own"), ({}, "not stated")):
        hub.card = card
        hub.offer({**SMALL, "model.safetensors": WEIGHTS})
        repository = Repository.named(ID)
        assert repository

        def say(line: str, license: str = license) -> None:
            assert license in line
            assert hub.asked() == set()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pull_hub(repository, silent, say, QUICK)


def test_shards(hub: Hub) -> None:
    """Shards come with their index. If there is also a model.safetensors, only that is downloaded."""
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 1000 for i in (1, 2)}
    index = {"model.safetensors.index.json": b"{}"}
    hub.offer({**SMALL, **shards, **index})
    assert names(pull()) == {*SMALL, *shards, *index}
    hub.offer({**SMALL, **shards, **index, "model.safetensors": WEIGHTS}, commit=OTHER)
    assert names(pull()) == {*SMALL, *index, "model.safetensors"}


def test_original_alone(hub: Hub) -> None:
    """Meta's files are downloaded if there are no safetensors."""
    meta = {"params.json": b"{}", "tokenizer.model": b"t", "consolidated.00.pth": b"c", "consolidated.01.pth": b"d"}
    hub.offer({**{f"original/{name}": data for name, data in meta.items()}, "README.md": b"x", "x.bin": b"x"})
    assert pull() == snapshot() / "original" == find_model(ID)
    assert names(snapshot()) == {*(f"original/{name}" for name in meta), "README.md"}


def test_what_was_fetched_is_found_offline(hub: Hub) -> None:
    """By OWNER/REPO and, if it is not main, the revision, without a request to the server."""
    pull()
    hub.offer({**SMALL, "model.safetensors": b"other"}, revision="v2/beta", commit=OTHER)
    pull(f"{ID}@v2/beta")
    hub.server.requests.clear()
    assert find_model(ID) == find_model(f"{ID}@{COMMIT}") == snapshot()
    assert find_model(f"{ID}@v2/beta") == snapshot(OTHER)
    assert hub.server.requests == []


def test_a_second_pull_fetches_nothing(hub: Hub) -> None:
    """It requests only the metadata."""
    pull()
    hub.server.requests.clear()
    assert pull() == snapshot()
    assert hub.asked() == set()


def test_a_cache_without_links(hub: Hub) -> None:
    """Without symlinks the snapshot contains the files themselves. They are not downloaded again."""
    pull()
    for path in snapshot().iterdir():
        path.resolve().rename(path)
    hub.server.requests.clear()
    assert pull() == snapshot()
    assert hub.asked() == set()


def test_a_new_commit(hub: Hub) -> None:
    """Unchanged files are not downloaded again, and the name refers to the new commit."""
    pull()
    hub.server.requests.clear()
    hub.offer(
        {**SMALL, "config.json": b'{"model_type": "llama", "new": 1}', "model.safetensors": WEIGHTS}, commit=OTHER
    )
    assert pull() == snapshot(OTHER) == find_model(ID)
    assert hub.asked() == {"config.json"}


def test_the_cache_is_the_hubs_own(hub: Hub) -> None:
    """Files that huggingface_hub downloaded are found, and vice versa."""
    for name in (*SMALL, "model.safetensors"):
        huggingface_hub.hf_hub_download(ID, name, cache_dir=cache())
    assert find_model(ID) == snapshot()
    hub.server.requests.clear()
    pull()
    assert hub.asked() == set()
    hub.offer({**SMALL, "model.safetensors": b"new"}, commit=OTHER)
    pull()
    for name in (*SMALL, "model.safetensors"):
        found = huggingface_hub.try_to_load_from_cache(ID, name, cache_dir=cache())
        assert found == str(snapshot(OTHER) / name)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HF_HOME": "~/a"}, "a/hub"),
        ({"HF_HUB_CACHE": "$HOME/b", "HF_HOME": "/nowhere"}, "b"),
        ({"HUGGINGFACE_HUB_CACHE": "~/c"}, "c"),
        ({"XDG_CACHE_HOME": ""}, ".cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(hub: Hub, variables: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same environment variables as in huggingface_hub."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pull().is_relative_to(Path.home() / place)
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    if "XDG_CACHE_HOME" in variables:
        monkeypatch.delenv("XDG_CACHE_HOME")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == str(Path.home() / place)


def test_the_token_goes_to_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN is sent with every request to the hub."""
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    pull()
    assert {headers.get("authorization", headers.get("Authorization")) for _, _, headers in hub.server.requests} == {
        "Bearer hf_abc"
    }


# --- Rejected repositories --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"model.Q4_0.gguf": b"GGUF", "README.md": b""}, ["GGUF", f"hf download {ID}"]),
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, ["pytorch_model.bin", "model.safetensors"]),
        ({"config.json": b"{}", "adapter_model.safetensors": b"x"}, ["adapter_model.safetensors"]),
        ({"model.safetensors": b"x"}, ["config.json"]),
        ({"README.md": b"x"}, ["no weights"]),
        ({}, ["no weights"]),
    ],
)
def test_a_repository_without_readable_weights(hub: Hub, files: dict[str, bytes], says: list[str]) -> None:
    """The error names the files that the repository has instead; nothing is downloaded."""
    hub.offer(files)
    assert_rejected(pull, CheckpointError, ID, *says)
    assert hub.asked() == set()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (b'{"model_type": "gemma3"}', "gemma3"),
        (b'{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', "quantized"),
        (b"{}", "None"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "list"),
    ],
)
def test_another_architecture(hub: Hub, config: bytes, says: str) -> None:
    """config.json is downloaded first, and nothing after it."""
    hub.offer({"model.safetensors": WEIGHTS, **SMALL, "config.json": config})
    assert_rejected(pull, CheckpointError, says)
    assert hub.asked() == {"config.json"}


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("at", ["config.json", "model.safetensors"])
def test_a_gated_repository(hub: Hub, status: int, at: str) -> None:
    """The error lists the steps in the right order."""
    for place in (COMMIT, "main"):
        gated = Answer(status, headers={"X-Error-Code": "GatedRepo"})
        hub.server.files[f"/{ID}/resolve/{place}/{at}"] = gated
    message = assert_rejected(pull, LlamaScratchError, f"{hub.server.url}/{ID}", "hf auth login", "HF_TOKEN")
    assert message.index("accept") < message.index("mail") < message.index("hf auth login")


@pytest.mark.parametrize(
    ("name", "answer", "kind", "says"),
    [
        (ID, Answer(401, headers={"X-Error-Code": "GatedRepo"}), LlamaScratchError, ["license", "hf auth login"]),
        (ID, Answer(401, headers={"X-Error-Code": "RepoNotFound"}), ModelNotFoundError, [ID, "private"]),
        (ID, Answer(401), LlamaScratchError, ["token", "hf auth login"]),
        (ID, Answer(404, headers={"X-Error-Code": "RepoNotFound"}), ModelNotFoundError, [ID, "Check the name"]),
        (f"{ID}@v9", Answer(404, headers={"X-Error-Code": "RevisionNotFound"}), ModelNotFoundError, [ID, "'v9'"]),
        (ID, Answer(403), LlamaScratchError, ["token"]),
        (ID, Answer(400), LlamaScratchError, ["400"]),
        (ID, Answer(200, HTML), LlamaScratchError, ["HF_ENDPOINT"]),
        (ID, Answer(200, b"{}"), LlamaScratchError, ["HF_ENDPOINT"]),
        (ID, Answer(200, b'{"id": "x", "sha": "../../x", "siblings": []}'), LlamaScratchError, ["HF_ENDPOINT"]),
    ],
)
def test_a_hub_that_refuses(
    hub: Hub, name: str, answer: Answer, kind: type[LlamaScratchError], says: list[str]
) -> None:
    """Each kind of error has its own message."""
    hub.server.files = {f"/api/models/{ID}/revision/{name.partition('@')[2] or 'main'}": answer}
    assert_rejected(lambda: pull(name), kind, *says)
    assert not cache().exists() or not names(cache())


def test_no_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error without retries."""
    with serving() as other:
        monkeypatch.setattr(constants, "ENDPOINT", other.url)
    assert_rejected(pull, LlamaScratchError, "connection", ID)


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names HF_HUB_OFFLINE, unless the model has already been downloaded."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_rejected(pull, ModelNotFoundError, "HF_HUB_OFFLINE", ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pull()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull() == snapshot()


def test_without_the_package(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to install the optional package. Models in the cache are found without it."""
    pull()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_rejected(pull, LlamaScratchError, 'pip install ".[hub]"')
    assert find_model(ID) == snapshot()


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any file."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert_rejected(pull, LlamaScratchError, "No space left", "space")
    monkeypatch.undo()


# --- Interruptions and wrong data -------------------------------------------------------------


def test_weights_go_on_where_they_ended(hub: Hub) -> None:
    """A dropped connection, in this run and in an earlier one."""
    file = hub.files["model.safetensors"]
    file.drops = [300_000] + [0] * 10
    assert_rejected(pull, LlamaScratchError, "resumes")
    assert_rejected(lambda: find_model(ID), ModelNotFoundError, f"llama-scratch pull {ID}")
    file.drops = []
    hub.server.requests.clear()
    pull()
    assert hub.server.ranges(f"/{ID}/resolve/{COMMIT}/model.safetensors") == ["bytes=300000-"]
    assert (snapshot() / "model.safetensors").read_bytes() == WEIGHTS
    assert not [name for name in names(cache()) if ".part" in name or ".incomplete" in name]


def test_weights_with_another_checksum(hub: Hub) -> None:
    """They are rejected. huggingface_hub would accept them."""
    hub.files["model.safetensors"].data = bytes(700_000)
    assert_rejected(pull, CheckpointError, "checksum")
    assert not (snapshot() / "model.safetensors").exists()


def test_kill_9(hub: Hub) -> None:
    """The program is killed in the middle of the weights. The next run resumes, and `--model` finds the model."""
    file = hub.files["model.safetensors"]
    file.stalls = [400_000]
    environment = os.environ | {"HF_ENDPOINT": hub.server.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "llama_scratch", "pull", ID]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    part = cache() / f"models--some-org--Tiny-Llama/blobs/{hashlib.sha256(WEIGHTS).hexdigest()}.part"
    try:
        wait_for(lambda: part.exists() and part.stat().st_size >= 300_000)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    here = part.stat().st_size
    hub.server.requests.clear()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    assert "license: llama3.2" in ended.stderr
    assert f"llama-scratch --model {ID}" in ended.stderr
    assert hub.server.ranges(f"/{ID}/resolve/{COMMIT}/model.safetensors") == [f"bytes={here}-"]
    assert find_model(ID) == snapshot()


# --- Names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", ("a/b", "main")),
        ("meta-llama/Llama-3.2-1B@main", ("meta-llama/Llama-3.2-1B", "main")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        (f"a/b@{COMMIT}", ("a/b", COMMIT)),
    ],
)
def test_a_name_of_the_hub(name: str, expected: tuple[str, str]) -> None:
    """OWNER/REPO, with or without a revision."""
    found = Repository.named(name)
    assert found
    assert (found.id, found.revision) == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a",
        "a/b/c",
        "/a/b",
        "a/",
        "./a",
        "../a",
        "~/a",
        "a/b@",
        "a/b@../x",
        "a/b@/x",
        "a/..",
        "a--b/c",
        "a/b\n",
        "ä/b",
    ],
)
def test_a_name_that_is_none(name: str) -> None:
    """Paths, and names that would escape from the cache."""
    assert Repository.named(name) is None


def test_a_path_goes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing directory takes precedence, and a `Path` is never the name of a repository."""
    pull()
    monkeypatch.chdir(tmp_path)
    assert find_model(ID) == snapshot()
    assert find_model(Path(ID)) == Path(ID)
    Path(ID).mkdir(parents=True)
    assert find_model(ID) == Path(ID)


@pytest.mark.parametrize("ref", ["", "x" * 40, "../../../x", "a" * 39, "\xff"])
def test_a_damaged_cache(ref: str) -> None:
    """A ref that does not contain a commit is ignored."""
    folder = cache() / "models--some-org--Tiny-Llama"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_bytes(ref.encode("latin-1"))
    assert_rejected(lambda: find_model(ID), ModelNotFoundError, f"llama-scratch pull {ID}")


def test_exit_codes(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    """On the command line: not downloaded, does not exist, not supported."""
    assert run(["--model", ID, "--prompt", "x"]) == 3
    assert f"llama-scratch pull {ID}" in capfd.readouterr().err
    assert run(["pull", "some-org/other"]) == 3
    hub.offer({"model.gguf": b""})
    assert run(["pull", ID]) == 4
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 2


def test_the_open_model_needs_no_hub() -> None:
    """Resolving a name imports neither huggingface_hub nor requests."""
    code = (
        "import sys; from llama_scratch.download.locate import find_model\n"
        "for name in ('smollm2', 'a/b', 'Llama3.2-1B'):\n"
        "    try: find_model(name)\n"
        "    except Exception as error: assert 'pull' in str(error)\n"
        "print(*{'huggingface_hub', 'requests', 'blobfile', 'urllib3'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == ""
