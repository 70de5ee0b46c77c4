"""Downloading Meta's models with a link, from a local test server that misbehaves in every known way."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.cli import run
from llama_scratch.download.http import RetryPolicy, exclusively, fetch, open_session
from llama_scratch.download.locate import find_model
from llama_scratch.download.meta import pull_meta
from llama_scratch.errors import CheckpointError, LlamaScratchError, UsageError
from llama_scratch.system.progress import silent
from tests.helpers.assertions import assert_rejected
from tests.helpers.loopback import HTML, XML, Answer, File, Server, serving, wait_for

NAME, FOLDER = "Llama3.2-1B", "/Llama-3.2-1B"
SHARDS = ["consolidated.00.pth", "consolidated.01.pth"]
SECRET = "c2VjcmV0IHNpZ25hdHVyZQ__"
QUICK = RetryPolicy(timeout=0.3, tries=3, pause=0.001)
CONTENT = {
    "params.json": b'{"dim": 2048}',
    "tokenizer.model": b"IQ== 0\n" * 100,
    **{name: random.Random(name).randbytes(700_000) for name in SHARDS},
}
MD5S = {name: hashlib.md5(data).hexdigest() for name, data in CONTENT.items()}
CHECKLIST = "".join(f"{md5}  ./{name}\n" for name, md5 in MD5S.items()).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    """Meta's server with one model of two shards."""
    with serving() as server:
        for name, data in {**CONTENT, "checklist.chk": CHECKLIST}.items():
            server.files[f"{FOLDER}/{name}"] = File(data)
        yield server


def link(server: Server) -> str:
    return f"{server.url}/*?Policy=eyJT&Signature={SECRET}&Key-Pair-Id=K15Q"


def pull(server: Server, name: str = NAME, patience: RetryPolicy = QUICK) -> tuple[Path, bool]:
    return pull_meta(name, link(server), silent, patience)


def weights(server: Server, shard: int = 0) -> File:
    file = server.files[f"{FOLDER}/{SHARDS[shard]}"]
    assert isinstance(file, File)
    return file


def folder() -> Path:
    return Path.home() / ".llama/checkpoints" / NAME


def here() -> set[str]:
    """The names of all files in ~/.llama/checkpoints."""
    root = folder().parent
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def is_whole() -> None:
    """Check that all files have the published content, and that there are no other files."""
    assert here() == {NAME, *(f"{NAME}/{name}" for name in [*CONTENT, "checklist.chk"])}
    for name, data in CONTENT.items():
        assert (folder() / name).read_bytes() == data


def rejected_without_secret(action: Callable[[], object], error: type[LlamaScratchError], *words: object) -> str:
    """Like `assert_rejected`, and check that the traceback, which --debug shows, does not contain the secret."""

    def watched() -> None:
        with pytest.raises(LlamaScratchError) as caught:
            action()
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        raise caught.value

    return assert_rejected(watched, error, *words)


def no_secret_is_kept() -> None:
    for path in Path.home().rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


# --- Downloads --------------------------------------------------------------------------------


def test_a_model_is_fetched_once(server: Server) -> None:
    """All files are downloaded, and a second run sends no requests."""
    assert pull(server) == (folder(), True)
    is_whole()
    asked = len(server.requests)
    assert pull(server) == (folder(), False)
    assert len(server.requests) == asked
    is_whole()
    no_secret_is_kept()


def test_the_link_is_used_as_meta_does(server: Server) -> None:
    """The * is replaced by folder and file; the rest of the link stays."""
    pull(server)
    paths = {path for _, path, _ in server.requests}
    assert f"{FOLDER}/params.json?Policy=eyJT&Signature={SECRET}&Key-Pair-Id=K15Q" in paths
    assert {method for method, _, _ in server.requests} == {"GET"}  # Meta's server rejects HEAD


@pytest.mark.parametrize("name", ["Llama3.2-1B", "Llama-3.2-1B"])
@pytest.mark.parametrize("served", ["/Llama-3.2-1B", "/Llama3.2-1B"])
def test_both_spellings(server: Server, name: str, served: str) -> None:
    """Meta's and Hugging Face's spelling mean the same local folder, whichever the server uses."""
    server.files = {path.replace(FOLDER, served): file for path, file in server.files.items()}
    assert pull(server, name)[0] == folder()
    is_whole()


def test_the_progress_is_of_all_files(server: Server) -> None:
    """It never decreases, and ends at the sum of the shards."""
    seen: list[tuple[str, int, int]] = []
    pull_meta(NAME, link(server), lambda *report: seen.append(report), QUICK)
    fetched = [(done, total) for stage, done, total in seen if stage.startswith("fetching")]
    assert fetched == sorted(fetched)
    assert fetched[-1] == (1_400_000, 1_400_000)
    assert {total for _, total in fetched} == {1_400_000}
    assert {stage for stage, _, _ in seen} == {"fetching file 1 of 2", "fetching file 2 of 2", "checking"}


def test_a_fetched_model_is_found_and_opens(server: Server, tiny_dir: Path) -> None:
    """A real, small model in Meta's format, found by its name and as the first of the usual places."""
    files = {path.name: path.read_bytes() for path in tiny_dir.iterdir()}
    sums = "".join(f"{hashlib.md5(data).hexdigest()}  {name}\r\n" for name, data in files.items())
    server.files = {f"{FOLDER}/{name}": File(data) for name, data in {**files, "checklist.chk": sums.encode()}.items()}
    pull(server)
    assert find_model() == find_model(NAME) == folder()
    assert open_checkpoint(find_model(NAME)).name == NAME


def test_what_is_there_and_right_stays(server: Server) -> None:
    """Only a damaged file is downloaded again, and replaced when the new one is complete."""
    pull(server)
    (folder() / SHARDS[1]).write_bytes(b"damaged")
    inode = (folder() / SHARDS[0]).stat().st_ino
    server.requests.clear()
    assert pull(server) == (folder(), True)
    is_whole()
    assert (folder() / SHARDS[0]).stat().st_ino == inode
    asked = {path.partition("?")[0] for _, path, _ in server.requests}
    assert asked == {f"{FOLDER}/checklist.chk", f"{FOLDER}/{SHARDS[1]}"}


# --- Connection failures ----------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_dropped_connection(server: Server, ranges: bool) -> None:
    """The download resumes, or restarts if the server does not support ranges."""
    weights(server).drops, weights(server).ranges = [300_000], ranges
    pull(server)
    is_whole()
    asked = server.ranges(f"{FOLDER}/{SHARDS[0]}")
    assert asked == ["", "bytes=300000-"]


def test_many_drops_on_the_way(server: Server) -> None:
    """The number of attempts is not limited while there is progress."""
    weights(server).drops = [70_000] * 8
    pull(server)
    is_whole()
    assert len(server.ranges(f"{FOLDER}/{SHARDS[0]}")) == 9


def test_a_server_that_only_drops(server: Server) -> None:
    """The download fails with an error and keeps the partial file; the next run resumes it."""
    weights(server).drops = [300_000] + [0] * 100
    rejected_without_secret(lambda: pull(server), LlamaScratchError, SHARDS[0], "dropped", "resumes")
    part = folder().parent / f".{NAME}.part" / f"{SHARDS[0]}.part"
    assert part.stat().st_size == 300_000
    assert not folder().exists()
    weights(server).drops = []
    server.requests.clear()
    pull(server)
    is_whole()
    assert server.ranges(f"{FOLDER}/{SHARDS[0]}") == ["bytes=300000-"]


@pytest.mark.parametrize("after", [0, 200_000])
def test_a_server_that_stalls(server: Server, after: int) -> None:
    """A connection that times out is closed, and a new one resumes the download."""
    weights(server).stalls = [after]
    pull(server)
    is_whole()


def test_a_server_that_is_busy(server: Server) -> None:
    """503, 429 and 500 are retried."""
    weights(server).first = [Answer(503), Answer(429, b"slow down")]
    first = server.files[f"{FOLDER}/params.json"]
    assert isinstance(first, File)
    first.first = [Answer(500)]
    pull(server)
    is_whole()


def test_a_server_that_is_not_there() -> None:
    """An error after some attempts."""
    with serving() as server:
        address = link(server)
    rejected_without_secret(
        lambda: pull_meta(NAME, address, silent, QUICK), LlamaScratchError, "no connection", "checklist.chk"
    )
    assert not folder().exists()


# --- Changed files ----------------------------------------------------------------------------


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("identity", [("etag", '"2"'), ("modified", "Tue, 02 Jan 2024 00:00:00 GMT")])
def test_a_file_that_changes_between_two_tries(server: Server, identity: tuple[str, str], if_range: bool) -> None:
    """The new version is downloaded from the beginning, even if the server ignores `If-Range`."""
    file = weights(server)
    new, file.data = file.data, bytes(700_000)
    file.etag, file.modified, file.if_range = 'W/"weak"', "Mon, 01 Jan 2024 00:00:00 GMT", if_range
    if identity[0] == "etag":
        file.etag = '"1"'
    file.drops = [300_000] + [0] * 10
    rejected_without_secret(lambda: pull(server), LlamaScratchError)
    tag = folder().parent / f".{NAME}.part" / f"{SHARDS[0]}.part.tag"
    assert tag.read_text() == getattr(file, identity[0])
    file.data, file.drops = new, []
    setattr(file, *identity)
    server.requests.clear()
    seen: list[int] = []
    pull_meta(NAME, link(server), lambda stage, done, total: seen.append(done) if "1 of" in stage else None, QUICK)
    is_whole()
    assert server.ranges(f"{FOLDER}/{SHARDS[0]}") == ["bytes=300000-"] + [""] * (not if_range)
    assert seen[0] < 300_000  # the new version was not appended to the old one


def test_a_file_that_changes_unnoticed(server: Server) -> None:
    """Without a version, the checksum detects the change, and the file is downloaded again."""
    file = weights(server)
    new, file.data, file.etag = file.data, bytes(700_000), ""
    file.drops = [300_000] + [0] * 10
    rejected_without_secret(lambda: pull(server), LlamaScratchError)
    file.data, file.drops = new, []
    server.requests.clear()
    pull(server)
    is_whole()
    first, second = server.ranges(f"{FOLDER}/{SHARDS[0]}")
    assert first.startswith("bytes=")
    assert second == ""


@pytest.mark.parametrize("told", ["bytes 0-699999/700000", "bytes 5/x", "nonsense", "bytes 300001-699999/700000"])
def test_a_wrong_content_range(server: Server, told: str) -> None:
    """The server sent a different range than requested, so the download restarts."""
    weights(server).drops, weights(server).content_range = [300_000], told
    pull(server)
    is_whole()


def test_a_part_that_is_too_long(server: Server) -> None:
    """The range is beyond the end of the file (416), so the download restarts."""
    work = folder().parent / f".{NAME}.part"
    work.mkdir(parents=True)
    (work / f"{SHARDS[0]}.part").write_bytes(bytes(800_000))
    pull(server)
    is_whole()


def test_a_part_that_is_all_of_it(server: Server) -> None:
    """Killed between the last byte and the rename: nothing is downloaded again."""
    work = folder().parent / f".{NAME}.part"
    work.mkdir(parents=True)
    (work / f"{SHARDS[0]}.part").write_bytes(CONTENT[SHARDS[0]])
    pull(server)
    is_whole()
    assert server.ranges(f"{FOLDER}/{SHARDS[0]}") == ["bytes=700000-"]


# --- Wrong data -------------------------------------------------------------------------------


def test_a_length_that_is_too_short(server: Server) -> None:
    """The announced bytes do not match the checksum, so the file is deleted."""
    weights(server).length = "500000"
    rejected_without_secret(lambda: pull(server), CheckpointError, SHARDS[0], "checksum")
    assert not any(SHARDS[0] in name for name in here())


def test_a_length_that_is_too_long(server: Server) -> None:
    """The connection ends early; the response to the next range shows that the file is complete."""
    weights(server).length = "900000"
    pull(server)
    is_whole()


def test_a_length_that_is_too_long_without_ranges(server: Server) -> None:
    """The file is never known to be complete, so the download fails after some attempts."""
    weights(server).length, weights(server).ranges = "900000", False
    rejected_without_secret(lambda: pull(server), LlamaScratchError, SHARDS[0])


@pytest.mark.parametrize("length", ["", "-5", "1e9", "9" * 30])
def test_no_length(server: Server, length: str) -> None:
    """A large file without a length is not downloaded."""
    weights(server).length, weights(server).endless = length, True
    rejected_without_secret(lambda: pull(server), LlamaScratchError, SHARDS[0])
    assert not any(SHARDS[0] in name for name in here())


def test_an_absurd_length(server: Server) -> None:
    """It is rejected before anything is written."""
    weights(server).length = "9" * 17
    rejected_without_secret(lambda: pull(server), CheckpointError, SHARDS[0], "at most")


@pytest.mark.parametrize("name", ["checklist.chk", "params.json", "tokenizer.model"])
def test_a_small_file_that_never_ends(server: Server, name: str) -> None:
    """It is read up to its limit."""
    file = server.files[f"{FOLDER}/{name}"]
    assert isinstance(file, File)
    file.endless, file.length = True, ""
    rejected_without_secret(lambda: pull(server), CheckpointError, name, "longer than")


@pytest.mark.parametrize("name", ["params.json", "tokenizer.model"])
def test_a_small_file_with_another_content(server: Server, name: str) -> None:
    """The MD5 in checklist.chk decides."""
    server.files[f"{FOLDER}/{name}"] = File(b"{}")
    rejected_without_secret(lambda: pull(server), CheckpointError, name, "MD5")


def test_params_that_no_checklist_names(server: Server) -> None:
    """Without a checksum they must at least be JSON."""
    rest = b"".join(line for line in CHECKLIST.splitlines(True) if b"params" not in line)
    server.files[f"{FOLDER}/checklist.chk"] = File(rest)
    server.files[f"{FOLDER}/params.json"] = File(b"[" * 100_000)
    rejected_without_secret(lambda: pull(server), CheckpointError, "params.json", "JSON")
    server.files[f"{FOLDER}/params.json"] = File(CONTENT["params.json"])
    pull(server)
    assert json.loads((folder() / "params.json").read_bytes()) == {"dim": 2048}


def test_weights_with_another_content(server: Server) -> None:
    """The file is deleted; the undamaged files are kept."""
    weights(server, 1).data = bytes(700_000)
    rejected_without_secret(lambda: pull(server), CheckpointError, SHARDS[1], "checksum")
    assert not folder().exists()
    assert (folder().parent / f".{NAME}.part" / SHARDS[0]).read_bytes() == CONTENT[SHARDS[0]]


@pytest.mark.parametrize(
    "checklist",
    [
        b"",
        b"hello\n",
        b"\xff\xfe\x00",
        f"{'0' * 64}  consolidated.00.pth\n".encode(),
        f"{MD5S['params.json']}  params.json\n".encode(),
        f"{'0' * 32}  consolidated.01.pth\n".encode(),
        f"{'0' * 32}  ../consolidated.00.pth\n".encode(),
        "".join(f"{'0' * 32}  consolidated.{i:02d}.pth\n" for i in range(65)).encode(),
        f"{'0' * 32}  consolidated.00.pth\n".encode() * 5000,
    ],
)
def test_a_checklist_that_is_none(server: Server, checklist: bytes) -> None:
    """It must list at most 64 shards, without a gap."""
    server.files[f"{FOLDER}/checklist.chk"] = File(checklist)
    rejected_without_secret(lambda: pull(server), CheckpointError, "checklist.chk")
    assert not folder().exists()


def test_names_in_the_checklist_that_are_none_of_a_model(server: Server, tmp_path: Path) -> None:
    """Unknown names are neither downloaded nor written; a path to another folder is rejected."""
    for name in ("../../evil", "/evil", "a/../../evil"):
        server.files[f"{FOLDER}/checklist.chk"] = File(CHECKLIST + f"{'0' * 32}  {name}\n".encode())
        rejected_without_secret(lambda: pull(server), CheckpointError, "checklist.chk", name, "in this directory")
        assert not folder().exists()
    server.files[f"{FOLDER}/checklist.chk"] = File(CHECKLIST + f"{'0' * 32}  a/evil\n{'1' * 32} *x.sh\n".encode())
    pull(server)
    assert {path.name for path in folder().iterdir()} == {*CONTENT, "checklist.chk"}
    assert not any("evil" in path or "x.sh" in path for _, path, _ in server.requests)


# --- Links ------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [Answer(403, HTML), Answer(403, XML), Answer(403), Answer(401), Answer(200, HTML)])
@pytest.mark.parametrize("at", ["checklist.chk", "tokenizer.model", SHARDS[0]])
def test_an_expired_link(server: Server, answer: Answer, at: str) -> None:
    """For any answer of the server, the error says that the link has expired and where to request a new one."""
    file = server.files[f"{FOLDER}/{at}"]
    assert isinstance(file, File)
    file.first = [answer]
    rejected_without_secret(
        lambda: pull(server), LlamaScratchError, "expired", "24 hours", "https://www.llama.com/llama-downloads/"
    )
    no_secret_is_kept()
    pull(server)
    is_whole()


@pytest.mark.parametrize("answer", [Answer(403, XML), Answer(200, HTML)])
def test_a_link_that_expires_on_the_way(server: Server, answer: Answer) -> None:
    """The partial download is kept, and resumes with the new link."""
    weights(server).drops = [300_000]
    weights(server).sent = lambda count: weights(server).first.append(answer) if count > 250_000 else None
    rejected_without_secret(lambda: pull(server), LlamaScratchError, "expired", "resumes")
    weights(server).sent, weights(server).first = lambda count: None, []
    server.requests.clear()
    pull(server)
    is_whole()
    assert server.ranges(f"{FOLDER}/{SHARDS[0]}") == ["bytes=300000-"]


def test_a_model_that_the_link_is_not_for(server: Server) -> None:
    """The server answers with 404."""
    server.otherwise = Answer(404)
    rejected_without_secret(lambda: pull(server, "Llama3.1-8B"), LlamaScratchError, "Llama3.1-8B", "Check the name")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("https://host/*?Policy=eyJT", "before its signature"),
        ("https://host/file?Policy=eyJT&Signature=x", "does not have *"),
        ("https://host/**?Policy=eyJT&Signature=x", "does not have *"),
        ("https://*/x?Policy=eyJT&Signature=x", "does not have *"),
        ("http://example.org/*?Policy=eyJT&Signature=x", "https"),
        ("http://127.0.0.1.example.org/*?Signature=x", "https"),
        ("http://127.0.0.1@example.org/*?Signature=x", "https"),
        ("ftp://127.0.0.1/*", "https"),
        ("file:///etc/*", "https"),
        ("https://[/*", "not a link"),
        ("", "https"),
        ("*", "https"),
    ],
)
def test_a_link_that_is_none(given: str, says: str) -> None:
    """The error says what is wrong with the link; no request is sent."""
    rejected_without_secret(lambda: pull_meta(NAME, given, silent, QUICK), UsageError, says, "single quotes")
    assert not folder().exists()


def test_a_link_with_what_shells_and_mails_add(server: Server) -> None:
    """Backslashes and line breaks are removed."""
    pasted = link(server).replace("?", "\\?").replace("&", "\\&\n") + "\n"
    pull_meta(NAME, pasted, silent, QUICK)
    is_whole()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc", "a/b", ".hidden", "a..b", "a\x00b", "a b", "x" * 101, "-x"]
)
def test_a_name_that_climbs(server: Server, name: str) -> None:
    """A name becomes a folder name and part of a URL: letters, digits, hyphens and single dots only."""
    rejected_without_secret(lambda: pull(server, name), UsageError, "Llama3.2-1B")
    assert server.requests == []


def test_a_quantized_release(server: Server) -> None:
    """It is rejected before gigabytes are downloaded."""
    rejected_without_secret(
        lambda: pull(server, "Llama3.2-1B-Instruct:int4-qlora-eo8"), UsageError, "quantized", "int4-qlora-eo8"
    )
    assert server.requests == []


@pytest.mark.parametrize("name", ["Llama3.1-405B", "Llama-3.1-405B-Instruct"])
def test_the_model_whose_plain_name_means_quantized_weights(server: Server, name: str) -> None:
    """405B is fp8 by default, half a terabyte that is not supported. The bf16 release has its own folder."""
    rejected_without_secret(lambda: pull(server, name), UsageError, "fp8", f"{name}:bf16-mp8")
    assert server.requests == []
    for file, data in {**CONTENT, "checklist.chk": CHECKLIST}.items():
        server.files[f"/Llama-3.1-{name[name.index('405B') :]}-MP8/{file}"] = File(data)
    path, _ = pull(server, f"{name}:bf16-mp8")
    assert path == find_model(path.name)
    assert path.name.startswith("Llama3.1-405B")
    assert path.name.endswith("-MP8")


def test_a_redirection(server: Server) -> None:
    """Redirects are followed on the same server, up to a limit, and never to another host without https."""
    weights(server).first = [Answer(302, headers={"Location": f"{FOLDER}/{SHARDS[0]}"})]
    pull(server)
    is_whole()
    shutil.rmtree(folder())
    with serving() as other:
        weights(server).first = [Answer(302, headers={"Location": f"{other.url}/x"})]
        rejected_without_secret(lambda: pull(server), LlamaScratchError, "without https")
        assert other.requests == []
    weights(server).first = [Answer(302, headers={"Location": f"{FOLDER}/{SHARDS[0]}"})] * 10
    rejected_without_secret(lambda: pull(server), LlamaScratchError, "TooManyRedirects")


# --- Disk errors and concurrent downloads -----------------------------------------------------


def test_a_full_disk(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is known before: the numbers. During the download: the partial file is kept."""
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("llama_scratch.download.http.shutil.disk_usage", lambda _: usage(free=100_000))
    rejected_without_secret(lambda: pull(server), LlamaScratchError, "0.0 GB of free space", SHARDS[0])
    monkeypatch.undo()

    def full(path: Path) -> bool:
        raise OSError(28, "No space left on device")

    target = Path.home() / "x"
    options: Any = {"is_whole": full, "report": lambda done, total: None, "retry": QUICK}
    url = f"{server.url}{FOLDER}/{SHARDS[0]}"
    rejected_without_secret(
        lambda: fetch(open_session(url), url, target, **options), LlamaScratchError, "No space left", Path.home()
    )
    assert target.with_name("x.part").stat().st_size == 700_000


def test_a_folder_that_cannot_be_written(server: Server) -> None:
    """A file in place of the folder: the error names it."""
    (Path.home() / ".llama").write_bytes(b"")
    rejected_without_secret(lambda: pull(server), LlamaScratchError, Path.home() / ".llama")


def test_two_at_once(server: Server) -> None:
    """The second download fails with an error, and the first one is not disturbed."""
    reached, report_progress = threading.Event(), threading.Event()

    def wait(count: int) -> None:
        reached.set()
        report_progress.wait(20)

    weights(server).sent = wait
    results: list[object] = []
    patient = RetryPolicy(timeout=20, tries=1, pause=0)
    thread = threading.Thread(target=lambda: results.append(pull(server, patience=patient)))
    thread.start()
    assert reached.wait(20)
    rejected_without_secret(lambda: pull(server), LlamaScratchError, NAME, "Another process")
    report_progress.set()
    thread.join()
    assert results == [(folder(), True)]
    is_whole()


def test_the_lock_ends_with_the_work(tmp_path: Path) -> None:
    """The lock is also released after an error."""
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), exclusively(tmp_path, "x"):
            raise KeyboardInterrupt


# --- Interruptions ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fetching file 1 of 2", "fetching file 2 of 2", "checking"])
def test_ctrl_c_anywhere(server: Server, stage: str) -> None:
    """The model's folder does not exist, and the next run downloads only the missing bytes."""
    fetched = 0

    def interrupt(now: str, done: int, total: int) -> None:
        nonlocal fetched
        fetched = max(fetched, done if now != "checking" else 0)
        if now == stage and done > 300_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_meta(NAME, link(server), interrupt, QUICK)
    assert not folder().exists()
    again = 0
    for shard in (0, 1):
        weights(server, shard).sent = lambda count: None
    server.requests.clear()
    pull(server)
    is_whole()
    for name in SHARDS:
        for asked in server.ranges(f"{FOLDER}/{name}"):
            again += 700_000 - int(asked.removeprefix("bytes=").removesuffix("-") or 0)
    assert again <= 1_400_000 - fetched + 70_000


def test_kill_9_at_some_moments(server: Server) -> None:
    """A process is killed without cleaning up; each following one resumes, and the last one finishes."""
    script = (
        "import sys; from llama_scratch.download.meta import pull_meta; "
        "pull_meta(sys.argv[1], sys.argv[2], lambda *_: None)"
    )
    for shard, until in ((0, 1 << 16), (0, 1 << 18), (1, 1 << 17)):  # killed in the middle of this one
        held = threading.Event()

        def hold(place: int, until: int = until, held: threading.Event = held) -> None:
            if place >= until:
                held.set()
                server.gone.wait(20)

        weights(server, 0).sent = hold if shard == 0 else lambda place: None
        weights(server, 1).sent = hold
        process = subprocess.Popen([sys.executable, "-c", script, NAME, link(server)], env=dict(os.environ))
        try:
            wait_for(held.is_set)
            if shard == 1:  # a moment later, in the middle of writing the file
                wait_for(lambda: any("consolidated.01.pth.part" in name for name in here()))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not folder().exists()
    for shard in (0, 1):
        weights(server, shard).sent = lambda count: None
    server.requests.clear()
    pull(server)
    is_whole()
    assert server.ranges(f"{FOLDER}/{SHARDS[0]}") == []  # it was already complete


# --- The command line -------------------------------------------------------------------------


def test_the_command(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    """It prints the folder and the next command to stderr, and never the link."""
    assert run(["pull", "Llama-3.2-1B", "--from-url", link(server)]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert str(folder()) in err
    assert "llama-scratch --model Llama3.2-1B" in err
    assert SECRET not in err
    assert run(["--quiet", "pull", NAME, "--from-url", link(server)]) == 0
    assert capfd.readouterr() == ("", "")


def test_the_link_from_standard_input(
    server: Server, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the link appears neither in the shell history nor in the process list."""
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(link(server) + "\n"))
    assert run(["pull", NAME, "--from-url", "-"]) == 0
    is_whole()


def test_the_command_refused(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    """The exit codes. Even --debug does not show the link."""
    server.files.clear()
    assert run(["--debug", "pull", NAME, "--from-url", link(server)]) == 1
    err = capfd.readouterr().err
    assert "expired" in err
    assert SECRET not in err
    assert run(["pull", "../x", "--from-url", link(server)]) == 2
    assert run(["pull", NAME]) == 2
    assert "--from-url" in capfd.readouterr().err
