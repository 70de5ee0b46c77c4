"""Resumable downloads over HTTP.

A signed link is a secret. Therefore URLs are not printed, stored or chained to an exception (`from None`).
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llama_scratch.errors import CheckpointError, LlamaScratchError
from llama_scratch.system.atomic_files import locked, publish
from llama_scratch.system.small_files import is_web_page

if TYPE_CHECKING:
    import requests

_CHUNK = 1 << 16
_MAX_WEIGHTS = 1 << 37  # bytes per file; the largest file that Meta published has 101 GB
_MAX_REDIRECTS = 5


@dataclass(frozen=True)
class RetryPolicy:
    """When to retry a request, and when to give up.

    Attributes:
        timeout: Seconds without receiving a byte until an attempt counts as failed.
        tries: Maximum number of consecutive attempts without progress.
        pause: Seconds before the next attempt. Doubles each time.
    """

    timeout: float = 30.0
    tries: int = 5
    pause: float = 1.0


class RefusedError(LlamaScratchError):
    """The server refused to send the file.

    Args:
        name: The file.
        status: The HTTP status; 200 if the server sent a web page instead of the file.
    """

    def __init__(self, name: str, status: int):
        what = "a web page" if status == 200 else f"status {status}"
        super().__init__(f"The server answered with {what} instead of {name}. Check the address and try again later.")
        self.status = status


class _TryAgainError(Exception):
    """A failure that a retry may fix. The message is the reason."""


def open_session(url: str) -> requests.Session:
    """Open a session that follows redirects only to https.

    If `url` is plain http, redirects to its own host are followed too.
    """
    import requests

    class HTTPSSession(requests.Session):
        def send(self, request: requests.PreparedRequest, **options: object) -> requests.Response:
            target = urlsplit(request.url or "")
            if target.scheme != "https" and (urlsplit(url).scheme != "http" or target.netloc != urlsplit(url).netloc):
                raise LlamaScratchError(
                    "The server redirected to an address without https, so nothing was downloaded. Request a new link."
                ) from None
            return super().send(request, **options)

    session = HTTPSSession()
    session.max_redirects = _MAX_REDIRECTS
    session.headers["Accept-Encoding"] = "identity"  # lengths and checksums are those of the uncompressed file
    return session


def fetch(
    session: requests.Session,
    url: str,
    target: Path,
    *,
    is_whole: Callable[[Path], bool],
    report: Callable[[int, int], None],
    retry: RetryPolicy,
    limit: int = _MAX_WEIGHTS,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Download a large file. Resumes an interrupted download.

    The data is in TARGET.part, and the version of the file in TARGET.part.tag, until the download is complete and
    verified. A download can also be resumed after the process was killed.

    Args:
        session: A session from `open_session`.
        url: The address.
        target: Where to save the file.
        is_whole: Returns whether the complete file matches its checksum.
        report: Called with the bytes downloaded so far and the total bytes.
        retry: When to retry and when to give up.
        limit: Maximum size in bytes.
        headers: Additional request headers.

    Raises:
        RefusedError: If the server does not send the file.
        CheckpointError: If the file is too large or its checksum is wrong.
        LlamaScratchError: If the connection or the disk fails.
    """
    part = target.with_name(f"{target.name}.part")
    furthest, failures = 0, 0
    with writing(target.parent):
        while True:
            try:
                in_one_piece = _resume(session, url, part, limit, report, retry.timeout, headers or {})
                if is_whole(part):
                    break
                _drop(part)
                if in_one_piece:
                    raise CheckpointError(
                        f"The downloaded {target.name} does not match its checksum and was deleted. Try again."
                    )
                raise _TryAgainError("the resumed file does not match its checksum")
            except _TryAgainError as error:
                reached = _size(part)
                failures = 0 if reached > furthest else failures + 1
                furthest = max(furthest, reached)
                if failures >= retry.tries:
                    raise LlamaScratchError(
                        f"{target.name} could not be downloaded ({error}). Check the connection and try again. The "
                        "download resumes."
                    ) from None
                time.sleep(retry.pause * 2**failures)
        publish(part, target)
        _tag(part).unlink(missing_ok=True)


def read_small(session: requests.Session, url: str, name: str, limit: int, retry: RetryPolicy) -> bytes:
    """Download a small file into memory.

    Args:
        session: A session from `open_session`.
        url: The address.
        name: The name for messages.
        limit: Maximum size in bytes.
        retry: When to retry and when to give up.

    Raises:
        RefusedError: If the server does not send the file.
        CheckpointError: If the file is longer than `limit`.
        LlamaScratchError: If the connection fails.
    """
    for attempt in range(retry.tries):
        if attempt:
            time.sleep(retry.pause * 2 ** (attempt - 1))
        try:
            with _answer(session, url, name, {}, retry.timeout) as response:
                data = b""
                for chunk in _chunks(response):
                    data += chunk
                    if len(data) > limit:
                        raise CheckpointError(
                            f"The {name} that the server sends is longer than {limit:,} bytes. Check the link."
                        )
                if is_web_page(data):
                    raise RefusedError(name, 200)
                return data
        except _TryAgainError as error:
            reason = str(error)
    raise LlamaScratchError(f"{name} could not be downloaded ({reason}). Check the connection and try again.")


def _resume(
    session: requests.Session,
    url: str,
    part: Path,
    limit: int,
    report: Callable[[int, int], None],
    timeout: float,
    headers: Mapping[str, str],
) -> bool:
    """Request and append the missing bytes. Returns whether that was the whole file."""
    name, here = part.name.removesuffix(".part"), _size(part)
    tag = _tag(part).read_text() if here and _tag(part).is_file() else ""
    asked = {"Range": f"bytes={here}-", **({"If-Range": tag} if tag else {})} if here else {}
    with _answer(session, url, name, {**headers, **asked}, timeout) as response:
        if response.status_code == 416 and response.headers.get("Content-Range", "") == f"bytes */{here}":
            return False  # the file is already complete
        fresh = response.status_code == 200
        start, total = (0, _length(response, name)) if fresh else _range(response)
        if not fresh and (start != here or (tag and _version(response) not in ("", tag))):
            _drop(part)
            raise _TryAgainError("the server sent a different range than requested")
        if total > limit:
            raise CheckpointError(f"{name} has {total:,} bytes, expected at most {limit:,}. Check the address.")
        chunks = _chunks(response)
        first = next(chunks, b"")
        if fresh:
            if is_web_page(first):  # checked before the partial file is discarded
                raise RefusedError(name, 200)
            _drop(part)
            _tag(part).write_text(_version(response))
        require_disk_space(part.parent, name, total - start)
        here = start
        with part.open("ab") as file:
            for chunk in chain([first], chunks):
                if here + len(chunk) > total:
                    raise _TryAgainError(f"the server sent more than the announced {total:,} bytes")
                file.write(chunk)
                here += len(chunk)
                report(here, total)
    if here < total:
        raise _TryAgainError(f"the connection ended after {here:,} of {total:,} bytes")
    return start == 0


@contextmanager
def _answer(
    session: requests.Session, url: str, name: str, headers: Mapping[str, str], timeout: float
) -> Iterator[requests.Response]:
    """Send a request. Yields the response before its body is read."""
    import requests

    try:
        response = session.get(url, headers=dict(headers), stream=True, timeout=timeout)
    except requests.exceptions.SSLError:
        raise LlamaScratchError(
            f"The server's certificate is not trusted, so {name} was not downloaded. Check the address and this "
            "machine's clock and certificates."
        ) from None
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
        raise _TryAgainError("no connection to the server") from None
    except requests.Timeout:
        raise _TryAgainError(f"no answer within {timeout:g} s") from None
    except requests.RequestException as error:  # too many redirects, an invalid address
        raise LlamaScratchError(
            f"{name} cannot be downloaded from that address ({type(error).__name__}). Check that it was copied in full."
        ) from None
    with response:
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise _TryAgainError(f"the server answered with status {response.status_code}")
        if response.status_code not in (200, 206, 416) or (response.status_code != 200 and "Range" not in headers):
            raise RefusedError(name, response.status_code)
        yield response


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """Yield the body as it arrives, to keep all bytes if the connection drops."""
    import urllib3

    try:
        while chunk := response.raw.read1(_CHUNK):
            yield chunk
    except urllib3.exceptions.HTTPError:
        raise _TryAgainError("the connection was dropped") from None


def _range(response: requests.Response) -> tuple[int, int]:
    """Parse Content-Range into start and total length: "bytes 5-9/10" → (5, 10).

    Returns (-1, 0) if the header is missing or not valid.
    """
    match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", response.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match and response.status_code == 206 else (-1, 0)


def _length(response: requests.Response, name: str) -> int:
    length = response.headers.get("Content-Length", "")
    if not re.fullmatch(r"\d{1,18}", length):
        raise LlamaScratchError(f"The server did not send the length of {name}, so nothing was saved. Try again later.")
    return int(length)


def _version(response: requests.Response) -> str:
    """The value for `If-Range`: a strong ETag or the Last-Modified date.

    Source: RFC 9110, 13.1.5.
    """
    etag = response.headers.get("ETag", "")
    version = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
    return version if version.isprintable() and len(version) < 200 else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _drop(part: Path) -> None:
    """Discard a partial download. Delete the data first: a tag alone is harmless."""
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)


def require_disk_space(folder: Path, name: str, needed: int) -> None:
    """Raise `LlamaScratchError` if a folder has too little free space for a download.

    Args:
        folder: The folder.
        name: The file to download, for the message.
        needed: Bytes still to be written.
    """
    if (free := shutil.disk_usage(folder).free) < needed:
        raise LlamaScratchError(
            f"{folder} has {free / 1e9:.1f} GB of free space, but {name} needs {needed / 1e9:.1f} GB more. "
            "Free up space and try again."
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError while writing into an error that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not raised by the operating system
            raise
        raise LlamaScratchError(
            f"Cannot write to {folder} ({error.strerror}). Check its free space and permissions and try again."
        ) from None


@contextmanager
def exclusively(folder: Path, name: str) -> Iterator[None]:
    """Lock a folder, so that only one process at a time writes to it.

    The lock is released if the process ends or is killed.

    Args:
        folder: The folder, created if necessary.
        name: The model, for the message.

    Raises:
        LlamaScratchError: If another process holds the lock, or if the folder cannot be created.
    """
    with ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(locked(folder.resolve()))
        if not alone:
            raise LlamaScratchError(f"Another process is downloading {name}. Wait until it has finished.")
        yield
