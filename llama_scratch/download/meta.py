"""Download Meta's models with the link that Meta sends by email."""

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
    """Download one of Meta's models to ~/.llama/checkpoints/NAME.

    The files are in a hidden folder next to it until all of them match the MD5s in checklist.chk. An interrupted
    download resumes from that folder.

    Args:
        name: Meta's descriptor, such as Llama3.2-1B.
        link: The link that Meta sends by email. It contains `*` in place of the file name.
        progress: Called with the stage, the bytes done and the total bytes.
        retry: When to retry and when to give up.

    Returns:
        The model's folder, and whether anything was downloaded.

    Raises:
        UsageError: If the name or the link is not valid.
        CheckpointError: If a downloaded file is damaged.
        LlamaScratchError: If the link has expired, or the connection or the disk fails.
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
    """The folder for Meta's models, which Meta's own downloader uses too."""
    try:
        return Path(CHECKPOINTS).expanduser()
    except RuntimeError:
        raise LlamaScratchError(f"{CHECKPOINTS} cannot be resolved without a home directory. Set HOME.") from None


def _checksums(checklist: bytes) -> dict[str, str]:
    """Parse checklist.chk: file → MD5.

    Raises:
        CheckpointError: If the file is not valid, or the numbers of the weight files have a gap.
    """
    sums = parse_checklist(checklist)
    shards = sorted(name for name in sums if _SHARD.fullmatch(name))
    if not 1 <= len(shards) <= _MAX_SHARDS or shards != [f"consolidated.{i:02d}.pth" for i in range(len(shards))]:
        raise CheckpointError(
            f"checklist.chk lists {len(shards)} weight files, expected consolidated.00.pth and so on without a gap. "
            "Check the link."
        )
    return sums


def _descriptor(name: str) -> str:
    """Normalize Meta's or Hugging Face's name of a model: Llama-3.2-1B → Llama3.2-1B.

    Only 405B is quantized by default. Its bf16 release has its own name and folder:
    Llama3.1-405B:bf16-mp8 → Llama3.1-405B-MP8.
    """
    name = re.sub(r":bf16-mp(\d+)$", r"-MP\1", name)
    if re.fullmatch(r"Llama-?3\.1-405B(-Instruct)?", name):
        raise UsageError(f"'{name}' is quantized to fp8, which is not supported. Use the name {name}:bf16-mp8 instead.")
    if ":" in name:
        raise UsageError(
            f"'{sanitize(name)}' is a quantized release, which is not supported. Leave out the colon and everything "
            "after it."
        )
    if not _NAME.fullmatch(name) or len(name) > 100:
        raise UsageError(
            f"'{sanitize(name)}' is not one of Meta's models. Use a name such as Llama3.2-1B or Llama3.1-8B-Instruct."
        )
    return re.sub(r"^Llama-(?=3\.\d)", "Llama", name)


def _checked(link: str) -> str:
    link = "".join(link.split()).replace("\\", "")  # some shells add backslashes when pasting
    advice = "Copy all of it from the email and put it in single quotes."
    try:
        parts = urlsplit(link)
        host = parts.hostname or ""
    except ValueError:
        raise UsageError(f"That is not a link. {advice}") from None
    if not host or (parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host))):
        raise UsageError(f"The link does not begin with https:// and a server name. {advice}")
    if parts.path.count("*") != 1 or "*" in parts.netloc:
        raise UsageError(f"The link does not have * in place of the file name (as in https://HOST/*?…). {advice}")
    if "Policy=" in parts.query and "Signature=" not in parts.query:
        raise UsageError(f"The link is cut off before its signature. {advice}")
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
    """Whether a file exists and matches its checksum, if the checksum is known."""
    return path.is_file() and (md5 is None or file_digest(path, "md5", progress) == md5)


def _fetch_all(name: str, link: str, target: Path, work: Path, progress: Progress, retry: RetryPolicy) -> None:
    """Download the files that `target` lacks to `work`."""
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
            progress(stage, before + done, before + size * (len(missing) - number))  # all shards have the same size

        def is_whole(part: Path, file: str = file) -> bool:
            return file_digest(part, "md5", progress) == sums[file]

        with _explaining(name):
            fetch(session, url(file), work / file, is_whole=is_whole, report=report, retry=retry)
        before += reached


def _folder(name: str, link: str, session: requests.Session, retry: RetryPolicy) -> tuple[str, bytes]:
    """Find a model's folder on Meta's server, and download its checklist.chk.

    For Llama3.2-1B it tries the folder Llama-3.2-1B, then Llama3.2-1B.
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
        raise CheckpointError(f"{file} does not match its MD5 in checklist.chk. Try again.")
    if file == "params.json":
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            raise CheckpointError("The params.json that the server sent is not JSON. Try again.") from None
    return data


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """Translate the errors of Meta's server into messages that say what to do."""
    try:
        yield
    except RefusedError as error:
        if error.status == 404:
            raise LlamaScratchError(
                f"Meta's server has no {name} under this link. Check the name, and that the link is for this model."
            ) from None
        answer = "a web page" if error.status == 200 else f"status {error.status}"
        raise LlamaScratchError(
            f"Meta's server answered with {answer} instead of {name}: the link has expired (it is valid for 24 hours) "
            f"or is for other models. Request a new one at {ASK_FOR_A_LINK} and try again. The download resumes."
        ) from None


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
