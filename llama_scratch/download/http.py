"""Fetch files over HTTP so that an interrupted fetch goes on where it ended.

Nothing here shows or keeps a URL, for a signed link is a secret: that is why errors are raised `from None`.
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
_MAX_WEIGHTS = 1 << 37  # bytes of one file; the largest that Meta published has 101 GB
_MAX_REDIRECTS = 5


@dataclass(frozen=True)
class RetryPolicy:
    """timeout: seconds without a byte that end a try. tries: how many in a row may bring nothing new.

    pause: seconds between two of them, twice as many each time.
    """

    timeout: float = 30.0
    tries: int = 5
    pause: float = 1.0


class RefusedError(LlamaScratchError):
    """The server does not give the file out; `status` is its HTTP status, 200 where it sent a web page instead."""

    def __init__(self, name: str, status: int):
        what = "a web page" if status == 200 else f"the status {status}"
        super().__init__(f"The server answered with {what}, expected {name}; check the address and try again later.")
        self.status = status


class _TryAgainError(Exception):
    """What another try may mend; says why."""


def open_session(url: str) -> requests.Session:
    """A session that follows redirects over https alone; plain http only to the host of `url`, where that has it."""
    import requests

    class HTTPSSession(requests.Session):
        def send(self, request: requests.PreparedRequest, **options: object) -> requests.Response:
            target = urlsplit(request.url or "")
            if target.scheme != "https" and (urlsplit(url).scheme != "http" or target.netloc != urlsplit(url).netloc):
                raise LlamaScratchError(
                    "The server sends on to an address without https, so nothing was fetched; ask for a new link."
                ) from None
            return super().send(request, **options)

    session = HTTPSSession()
    session.max_redirects = _MAX_REDIRECTS
    session.headers["Accept-Encoding"] = "identity"  # lengths and checksums are those of the file itself
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
    """Fetch a large file; it appears under its name when it is whole and `is_whole` says so.

    What came so far is in TARGET.part and the version it belongs to in TARGET.part.tag, so that the next try goes
    on where this one ended, also after the process was killed. report: called with bytes here and bytes in all.
    Raises `RefusedError`, `CheckpointError` where what came is wrong, `LlamaScratchError` where the rest fails.
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
                        f"{target.name} does not have its checksum after it was fetched, so nothing of it was kept; "
                        "try again."
                    )
                raise _TryAgainError("its parts do not fit together")
            except _TryAgainError as error:
                reached = _size(part)
                failures = 0 if reached > furthest else failures + 1
                furthest = max(furthest, reached)
                if failures >= retry.tries:
                    raise LlamaScratchError(
                        f"{target.name} could not be fetched ({error}); check the connection and run it again, "
                        "it goes on from there."
                    ) from None
                time.sleep(retry.pause * 2**failures)
        publish(part, target)
        _tag(part).unlink(missing_ok=True)


def read_small(session: requests.Session, url: str, name: str, limit: int, retry: RetryPolicy) -> bytes:
    """A small file's content, of at most `limit` bytes. Raises as `fetch` does."""
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
                            f"What the server sends as {name} is longer than {limit:,} bytes, expected far less; "
                            "check the link."
                        )
                if is_web_page(data):
                    raise RefusedError(name, 200)
                return data
        except _TryAgainError as error:
            reason = str(error)
    raise LlamaScratchError(f"{name} could not be fetched ({reason}); check the connection and run it again.")


def _resume(
    session: requests.Session,
    url: str,
    part: Path,
    limit: int,
    report: Callable[[int, int], None],
    timeout: float,
    headers: Mapping[str, str],
) -> bool:
    """One try: ask for what is still missing and append it. Returns whether all came in this one."""
    name, here = part.name.removesuffix(".part"), _size(part)
    tag = _tag(part).read_text() if here and _tag(part).is_file() else ""
    asked = {"Range": f"bytes={here}-", **({"If-Range": tag} if tag else {})} if here else {}
    with _answer(session, url, name, {**headers, **asked}, timeout) as response:
        if response.status_code == 416 and response.headers.get("Content-Range", "") == f"bytes */{here}":
            return False  # all of it is here
        fresh = response.status_code == 200
        start, total = (0, _length(response, name)) if fresh else _range(response)
        if not fresh and (start != here or (tag and _version(response) not in ("", tag))):
            _drop(part)
            raise _TryAgainError("the server sent another part of it than was asked for")
        if total > limit:
            raise CheckpointError(f"{name} would have {total:,} bytes, expected at most {limit:,}; check the address.")
        chunks = _chunks(response)
        first = next(chunks, b"")
        if fresh:
            if is_web_page(first):  # before what is here is given up for it
                raise RefusedError(name, 200)
            _drop(part)
            _tag(part).write_text(_version(response))
        require_disk_space(part.parent, name, total - start)
        here = start
        with part.open("ab") as file:
            for chunk in chain([first], chunks):
                if here + len(chunk) > total:
                    raise _TryAgainError(f"more came than the {total:,} bytes that were announced")
                file.write(chunk)
                here += len(chunk)
                report(here, total)
    if here < total:
        raise _TryAgainError(f"it ended after {here:,} of {total:,} bytes")
    return start == 0


@contextmanager
def _answer(
    session: requests.Session, url: str, name: str, headers: Mapping[str, str], timeout: float
) -> Iterator[requests.Response]:
    """The server's answer, its body still to come."""
    import requests

    try:
        response = session.get(url, headers=dict(headers), stream=True, timeout=timeout)
    except requests.exceptions.SSLError:
        raise LlamaScratchError(
            f"The server's certificate is not trusted, so {name} was not fetched; check the address and this "
            "machine's clock and certificates."
        ) from None
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
        raise _TryAgainError("there is no connection to the server") from None
    except requests.Timeout:
        raise _TryAgainError(f"no answer within {timeout:g} s") from None
    except requests.RequestException as error:  # too many redirects, an address that is none
        raise LlamaScratchError(
            f"{name} cannot be fetched from that address ({type(error).__name__}); check that it was copied whole."
        ) from None
    with response:
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise _TryAgainError(f"the server answered with the status {response.status_code}")
        if response.status_code not in (200, 206, 416) or (response.status_code != 200 and "Range" not in headers):
            raise RefusedError(name, response.status_code)
        yield response


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """The body as it comes, so that nothing of it is lost where the connection breaks off."""
    import urllib3

    try:
        while chunk := response.raw.read1(_CHUNK):
            yield chunk
    except urllib3.exceptions.HTTPError:
        raise _TryAgainError("the connection was dropped") from None


def _range(response: requests.Response) -> tuple[int, int]:
    """ "bytes 5-9/10" → (5, 10): where what was sent begins, and the length of the whole; (-1, 0) for anything else."""
    match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", response.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match and response.status_code == 206 else (-1, 0)


def _length(response: requests.Response, name: str) -> int:
    length = response.headers.get("Content-Length", "")
    if not re.fullmatch(r"\d{1,18}", length):
        raise LlamaScratchError(f"The server does not say how long {name} is, so it was not fetched; try again later.")
    return int(length)


def _version(response: requests.Response) -> str:
    """What `If-Range` may name: a strong ETag, else the date of the last change. Source: RFC 9110, 13.1.5."""
    etag = response.headers.get("ETag", "")
    version = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
    return version if version.isprintable() and len(version) < 200 else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _drop(part: Path) -> None:
    """The bytes first: a part without a version is only started anew, or found wrong at the end."""
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)


def require_disk_space(folder: Path, name: str, needed: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed:
        raise LlamaScratchError(
            f"{folder} has room for {free / 1e9:.1f} GB and {name} still needs {needed / 1e9:.1f} GB; "
            "make room there and run it again."
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a sentence that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        raise LlamaScratchError(
            f"{folder} cannot be written to ({error.strerror}); make room there and run it again, it goes on."
        ) from None


@contextmanager
def exclusively(folder: Path, name: str) -> Iterator[None]:
    """A stretch of work in a folder that only one process does at a time; the lock ends with the process."""
    with ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(locked(folder.resolve()))
        if not alone:
            raise LlamaScratchError(f"{name} is being fetched by another process; wait until it has ended.")
        yield
