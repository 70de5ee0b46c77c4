"""A loopback web server with configurable faults."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

HTML = b"<!DOCTYPE html><html><body>Expired</body></html>"
XML = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"


@dataclass
class Answer:
    """A status and a body instead of a file."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class File:
    """A file and how it is served.

    Args:
        data: The contents.
        etag: ETag of the version.
        modified: Last-Modified of the version.
        ranges: Whether `Range` is honored.
        if_range: Whether `If-Range` is honored.
        length: A wrong Content-Length to send, or "" for none.
        drops: Bytes after which the connection is closed, one per response.
        stalls: Bytes after which the response stalls with an open connection, one per response.
        first: Answers to the first requests, one per request.
        content_range: A wrong Content-Range to send with status 206.
        endless: Whether the body never ends.
        headers: Additional headers.
        sent: Called with the number of bytes sent so far.
    """

    data: bytes
    etag: str = '"1"'
    modified: str = ""
    ranges: bool = True
    if_range: bool = True
    length: str | None = None
    drops: list[int] = field(default_factory=list)
    stalls: list[int] = field(default_factory=list)
    first: list[Answer] = field(default_factory=list)
    content_range: str | None = None
    endless: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    sent: Callable[[int], None] = lambda count: None


class Server(ThreadingHTTPServer):
    """The server.

    Attributes:
        files: Files and answers by path, without the query.
        otherwise: The answer for all other paths.
        requests: Method, path with query and headers of each request.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, File | Answer] = {}
        self.otherwise = Answer(403, XML)
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.gone = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self, path: str) -> list[str]:
        """The `Range` header of each GET request for a file; "" for the whole file."""
        return [
            headers.get("Range", "")
            for method, asked, headers in self.requests
            if method == "GET" and urlsplit(asked).path == path
        ]

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore disconnected clients, which the tests cause on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        found = self.server.files.get(unquote(urlsplit(self.path).path), self.server.otherwise)
        if isinstance(found, File) and body and found.first:
            found = found.first.pop(0)
        if isinstance(found, Answer):
            self._plain(found, body)
        else:
            self._file(found, body)

    def _plain(self, answer: Answer, body: bool) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(answer.body)

    def _file(self, file: File, body: bool) -> None:
        start, status = 0, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, file.etag, file.modified) or not file.if_range
        if match and file.ranges and same:
            start, status = int(match[1]), 206
            if start >= len(file.data):
                self._plain(Answer(416, headers={"Content-Range": f"bytes */{len(file.data)}"}), body)
                return
        end = int(match[2]) + 1 if match and status == 206 and match[2] else len(file.data)
        data = file.data[start:end]
        self.send_response(status)
        if status == 206:
            given = f"bytes {start}-{start + len(data) - 1}/{len(file.data)}"
            self.send_header("Content-Range", file.content_range or given)
        length = str(len(data)) if file.length is None else file.length
        for name, value in {"Content-Length": length, "ETag": file.etag, "Last-Modified": file.modified}.items():
            if value:
                self.send_header(name, value)
        for name, value in file.headers.items():
            self.send_header(name, value)
        self.close_connection = True
        self.send_header("Connection", "close")
        self.end_headers()
        if body:
            self._body(file, data)

    def _body(self, file: File, data: bytes) -> None:
        drop = file.drops.pop(0) if file.drops else None
        stall = file.stalls.pop(0) if file.stalls else None
        data = data[: min(len(data), *(n for n in (drop, stall, len(data)) if n is not None))]
        for place in range(0, len(data), 1 << 16):
            self.wfile.write(data[place : place + (1 << 16)])
            self.wfile.flush()
            file.sent(place + (1 << 16))
        while file.endless:
            self.wfile.write(bytes(1 << 16))
        if stall is not None:
            self.server.gone.wait(20)


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server in a thread."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.gone.set()
        server.shutdown()
        server.server_close()
        thread.join()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until a condition holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.005)
