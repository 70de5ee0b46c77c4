"""A loopback Google Cloud Storage for the real blobfile package."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import urllib3

from tests.helpers.loopback import Answer, File, Server

GOOGLE = "https://storage.googleapis.com/storage/v1/b/bucket"


class Pool(urllib3.PoolManager):
    """Redirects requests for Google to the loopback server.

    The path names the kind of request.
    """

    def __init__(self, url: str):
        super().__init__()
        self.url = url

    def request(self, method: str, url: str, *arguments: Any, **options: Any) -> Any:
        assert url.startswith(GOOGLE)
        parts = urlsplit(url.removeprefix(GOOGLE))
        query, name = parse_qs(parts.query), unquote(parts.path).removeprefix("/o").removeprefix("/")
        kind = "list" if "prefix" in query else "media" if "alt" in query else "meta"
        name = query["prefix"][0] if kind == "list" else name
        return super().request(method, f"{self.url}/{kind}/{name}", *arguments, **options)


class Storage:
    """A bucket. Each change of a file increases its generation."""

    def __init__(self, server: Server):
        self.server = server
        server.otherwise = Answer(404, b"{}")
        self.items: dict[str, dict[str, str]] = {}
        self.generation = 0

    def put(self, name: str, data: bytes, **changes: str) -> File:
        """Add a file, and update its metadata and the listings of its parent folders.

        Args:
            name: The object's name.
            data: The contents.
            changes: Metadata fields to replace.
        """
        self.generation += 1
        self.items[name] = {
            "name": name,
            "size": str(len(data)),
            "generation": str(self.generation),
            "updated": f"2024-01-01T00:00:{self.generation % 60:02d}.000Z",
            "timeCreated": "2024-01-01T00:00:00.000Z",
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            **changes,
        }
        if not self.items[name]["md5Hash"]:
            del self.items[name]["md5Hash"]
        file = File(data)
        self.server.files[f"/media/{name}"] = file
        self._tell()
        return file

    def remove(self, name: str) -> None:
        for kind in ("media", "meta"):
            del self.server.files[f"/{kind}/{name}"]
        del self.items[name]
        self._tell()

    def _tell(self) -> None:
        listings: dict[str, dict[str, list[Any]]] = {}
        for name, item in self.items.items():
            self.server.files[f"/meta/{name}"] = Answer(200, json.dumps(item).encode())
            parts = name.split("/")
            for depth in range(1, len(parts)):
                listing = listings.setdefault("/".join(parts[:depth]) + "/", {"items": [], "prefixes": []})
                if depth == len(parts) - 1:
                    listing["items"].append(item)
                else:
                    listing["prefixes"].append("/".join(parts[: depth + 1]) + "/")
        for prefix, listing in listings.items():
            self.server.files[f"/list/{prefix}"] = Answer(200, json.dumps(listing).encode())

    def fetched(self) -> dict[str, int]:
        """Count the requests for the contents of each file."""
        paths = [path.removeprefix("/media/") for _, path, _ in self.server.requests if path.startswith("/media/")]
        return {path.rsplit("/", 1)[-1]: paths.count(path) for path in paths}
