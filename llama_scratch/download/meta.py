"""A model of Meta's, fetched by the link that Meta mails: resumed where it was interrupted, checked by its MD5s."""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llama_scratch.checkpoint.checksums import MAX_CHECKLIST, parse_checklist
from llama_scratch.download.http import (
    RefusedError,
    RetryPolicy,
    exclusively,
    fetch,
    open_session,
    read_small,
    writing,
)
from llama_scratch.errors import CheckpointError, LlamaScratchError, UsageError, sanitize
from llama_scratch.system.atomic_files import write_atomically
from llama_scratch.system.hashing import file_digest, new_digest
from llama_scratch.system.progress import Progress
from llama_scratch.system.small_files import read_bytes

if TYPE_CHECKING:
    import requests

CHECKPOINTS = "~/.llama/checkpoints"
ASK_FOR_A_LINK = "https://www.llama.com/llama-downloads/"

_MAX_PARAMS, _MAX_TOKENIZER = 1 << 20, 1 << 24  # bytes
_MAX_SHARDS = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_SHARD = re.compile(r"consolidated\.\d\d\.pth")


def pull_meta(name: str, link: str, progress: Progress, retry: RetryPolicy | None = None) -> tuple[Path, bool]:
    """Fetch a model of Meta's into ~/.llama/checkpoints/NAME; returns that folder and whether anything was fetched.

    name: Meta's descriptor, such as Llama3.2-1B. link: the one that Meta mails, with its `*`. Until all files are
    there and have the MD5s of checklist.chk they lie in a folder beside it, from which an interrupted fetch goes on.
    Raises `UsageError`, `CheckpointError` and `LlamaScratchError`.
    """
    name, retry = _descriptor(name), retry or RetryPolicy()
    root = folder_of_checkpoints()
    target, work = root / name, root / f".{name}.part"
    link = _checked(link)
    with exclusively(work, name), writing(work):
        if _is_whole(target, progress):
            _remove(work)
            return target, False
        _fetch_all(name, link, target, work, progress, retry)
        if target.exists():
            for file in work.iterdir():
                if file.suffix not in (".part", ".tag"):
                    file.replace(target / file.name)
            _remove(work)
        else:
            work.rename(target)
    return target, True


def folder_of_checkpoints() -> Path:
    """Where Meta's own downloader puts its models too."""
    try:
        return Path(CHECKPOINTS).expanduser()
    except RuntimeError:
        raise LlamaScratchError(f"{CHECKPOINTS} cannot be found without a home folder; set HOME to it.") from None


def _checksums(checklist: bytes) -> dict[str, str]:
    """{file: MD5}. Raises `CheckpointError` where it names no weights or too many."""
    sums = parse_checklist(checklist)
    shards = sorted(name for name in sums if _SHARD.fullmatch(name))
    if not 1 <= len(shards) <= _MAX_SHARDS or shards != [f"consolidated.{i:02d}.pth" for i in range(len(shards))]:
        raise CheckpointError(
            f"checklist.chk names {len(shards)} files of weights, expected consolidated.00.pth and so on without a gap."
        )
    return sums


def _descriptor(name: str) -> str:
    """Meta's name of a model, also from Hugging Face's: Llama-3.2-1B → Llama3.2-1B.

    The one model that is quantized unless its name says otherwise is 405B: Llama3.1-405B:bf16-mp8 → …-405B-MP8, as its
    folder is called.
    """
    name = re.sub(r":bf16-mp(\d+)$", r"-MP\1", name)
    if re.fullmatch(r"Llama-?3\.1-405B(-Instruct)?", name):
        raise UsageError(f"'{name}' is quantized to fp8, which cannot be run here; name {name}:bf16-mp8 instead.")
    if ":" in name:
        raise UsageError(
            f"'{sanitize(name)}' is a quantized release, which cannot be run here; name the model without what "
            "follows the colon."
        )
    if not _NAME.fullmatch(name) or len(name) > 100:
        raise UsageError(
            f"'{sanitize(name)}' is not a name of Meta's, expected one such as Llama3.2-1B or Llama3.1-8B-Instruct."
        )
    return re.sub(r"^Llama-(?=3\.\d)", "Llama", name)


def _checked(link: str) -> str:
    link = "".join(link.split()).replace("\\", "")  # some shells put backslashes into what is pasted
    advice = "copy it whole from the mail and put it in single quotes."
    try:
        parts = urlsplit(link)
        host = parts.hostname or ""
    except ValueError:
        raise UsageError(f"That is not a link; {advice}") from None
    if not host or (parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host))):
        raise UsageError(f"The link does not begin with https and a server's name; {advice}")
    if parts.path.count("*") != 1 or "*" in parts.netloc:
        raise UsageError(
            f"The link has no * in the place of the file's name, expected one as in https://HOST/*?…; {advice}"
        )
    if "Policy=" in parts.query and "Signature=" not in parts.query:
        raise UsageError(f"The link ends before its signature; {advice}")
    return link


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _is_whole(folder: Path, progress: Progress) -> bool:
    try:
        sums = _checksums(read_bytes(folder / "checklist.chk", MAX_CHECKLIST))
    except (OSError, CheckpointError):
        return False
    wanted = ["params.json", "tokenizer.model", *(name for name in sums if _SHARD.fullmatch(name))]
    return all(_matches(folder / name, sums.get(name), progress) for name in wanted)


def _matches(path: Path, md5: str | None, progress: Progress) -> bool:
    """Whether a file is there and, where its checksum is known, has it."""
    return path.is_file() and (md5 is None or file_digest(path, "md5", progress) == md5)


def _fetch_all(name: str, link: str, target: Path, work: Path, progress: Progress, retry: RetryPolicy) -> None:
    """Bring into `work` what `target` lacks."""
    session = open_session(link)
    folder, checklist = _folder(name, link, session, retry)
    sums = _checksums(checklist)
    write_atomically(work / "checklist.chk", checklist, mode=0o666)

    def url(file: str) -> str:
        return link.replace("*", f"{folder}/{file}", 1)

    def is_here(file: str) -> bool:
        return any(_matches(place / file, sums.get(file), progress) for place in (target, work))

    for file, limit in (("tokenizer.model", _MAX_TOKENIZER), ("params.json", _MAX_PARAMS)):
        if not is_here(file):
            write_atomically(work / file, _small(session, url(file), file, limit, retry, sums.get(file)), mode=0o666)
    missing = [file for file in sorted(sums) if _SHARD.fullmatch(file) and not is_here(file)]
    before = 0
    for number, file in enumerate(missing):
        stage = "fetching" if len(missing) == 1 else f"fetching file {number + 1} of {len(missing)}"
        reached = 0

        def report(done: int, size: int, before: int = before, number: int = number, stage: str = stage) -> None:
            nonlocal reached
            reached = size
            progress(stage, before + done, before + size * (len(missing) - number))  # shards are equally long

        def is_whole(part: Path, file: str = file) -> bool:
            return file_digest(part, "md5", progress) == sums[file]

        with _explaining(name):
            fetch(session, url(file), work / file, is_whole=is_whole, report=report, retry=retry)
        before += reached


def _folder(name: str, link: str, session: requests.Session, retry: RetryPolicy) -> tuple[str, bytes]:
    """The folder on Meta's server, and its checklist.chk: Llama-3.2-1B for Llama3.2-1B, else the name itself.

    Source: `llama_meta_net_info` in llama-models.
    """
    first = re.sub(r"^Llama(?=\d)", "Llama-", name)
    with _explaining(name):
        try:
            url = link.replace("*", f"{first}/checklist.chk", 1)
            return first, read_small(session, url, "checklist.chk", MAX_CHECKLIST, retry)
        except RefusedError:
            if first == name:
                raise
        url = link.replace("*", f"{name}/checklist.chk", 1)
        return name, read_small(session, url, "checklist.chk", MAX_CHECKLIST, retry)


def _small(session: requests.Session, url: str, file: str, limit: int, retry: RetryPolicy, md5: str | None) -> bytes:
    with _explaining(file):
        data = read_small(session, url, file, limit, retry)
    if md5 is not None and new_digest("md5", data).hexdigest() != md5:
        raise CheckpointError(f"{file} does not have the MD5 that checklist.chk gives for it; run it again.")
    if file == "params.json":
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            raise CheckpointError("What the server sent as params.json is not JSON; run it again.") from None
    return data


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """What it means when Meta's server refuses."""
    try:
        yield
    except RefusedError as error:
        if error.status == 404:
            raise LlamaScratchError(
                f"Meta's server has no {name} under this link; check the name, and that the link was mailed for it."
            ) from None
        answer = "with a web page" if error.status == 200 else f"with the status {error.status}"
        raise LlamaScratchError(
            f"Meta's server refuses {name} {answer}, so the link has expired (it is good for 24 hours) "
            f"or was mailed for other models; ask for a new one at {ASK_FOR_A_LINK} and run it again, it goes on."
        ) from None


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
