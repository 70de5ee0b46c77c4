"""Checksums of files, computed block by block, with progress."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llama_scratch.system.progress import Progress, silent

if TYPE_CHECKING:
    from hashlib import _Hash

BLOCK_BYTES = 1 << 20


def new_digest(algorithm: str, data: bytes = b"") -> _Hash:
    """Create a digest that detects damage, not forgery.

    MD5 works even if a policy forbids it for security purposes.

    Args:
        algorithm: A name for hashlib, such as "md5".
        data: The first bytes to hash.
    """
    return hashlib.new(algorithm, data, usedforsecurity=False)


def add_blocks(digests: Collection[_Hash], blocks: Iterable[bytes], advance: Callable[[int], None]) -> None:
    """Feed blocks of a file to several digests.

    Args:
        digests: The digests.
        blocks: The blocks.
        advance: Called with the length of each block.
    """
    for block in blocks:
        for digest in digests:
            digest.update(block)  # releases the GIL
        advance(len(block))


def blocks_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the rest of a file, block by block."""
    return iter(partial(file.read, BLOCK_BYTES), b"")


def file_digest(path: Path, algorithm: str, progress: Progress = silent) -> str:
    """Compute a file's checksum in hexadecimal.

    Args:
        path: The file.
        algorithm: A name for hashlib, such as "sha256".
        progress: Called with "checking", the bytes read so far and the total bytes.
    """
    digest, size = new_digest(algorithm), path.stat().st_size
    with path.open("rb", buffering=0) as file:
        add_blocks([digest], blocks_of(file), lambda _: progress("checking", file.tell(), size))
    return digest.hexdigest()
