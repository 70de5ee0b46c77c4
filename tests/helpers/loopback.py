"""A web server on loopback that behaves as badly as it is told to."""

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
    """A status and a body in place of the file."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class File:
    """A file, and how it is given out.

    etag, modified: what identifies its version. ranges: whether `Range` is honored. length: the Content-Length
    that is claimed in place of the true one, "" for none. drops: after how many bytes each body ends, one an answer.
    stalls: the same, but the connection stays open. first: answers that come before any other, one a request.
    content_range: sent with 206 in place of the true one. endless: the body never ends. sent: called with the number
    of bytes that went out so far.
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
    """files: by path, without the query. requests: method, path with query and headers of each that came."""

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
        """What was asked for of a file, in order: "" for all of it."""
        return [
            headers.get("Range", "")
            for method, asked, headers in self.requests
            if method == "GET" and urlsplit(asked).path == path
        ]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what the tests are about."""


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
    """A server that runs in a thread."""
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
    """Wait until something is so; an error where it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
