"""Models at gs:// and az://, downloaded to the user's cache.

Weights are downloaded once, small files each time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llama_scratch.checkpoint.checksums import parse_checklist
from llama_scratch.download.http import exclusively, require_disk_space, writing
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError, sanitize
from llama_scratch.system.atomic_files import publish, remove_stale, write_atomically
from llama_scratch.system.folders import is_ours, user_folder
from llama_scratch.system.hashing import file_digest
from llama_scratch.system.progress import Progress

if TYPE_CHECKING:
    from blobfile import Context, Stat

_ADDRESS = re.compile(r"(gs|az):/{1,2}([^/].*)", re.DOTALL)
_WEIGHTS = re.compile(r"consolidated\.\d\d\.pth|model(-\d{5}-of-\d{5})?\.safetensors")
_SMALL = re.compile(
    r"params\.json|tokenizer\.model|checklist\.chk|chat_template\.\w+|LICENSE\S*|README\.md"
    r"|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json"
)
_MAX_SMALL = 1 << 26  # bytes; the largest tokenizer.json of a Llama is 17 MB
_MAX_NAMES = 10_000
_BLOCK = 1 << 22
_RETRIES = 4


def remote_address(source: str) -> str | None:
    """Normalize the address of a remote model. Returns None for a local path.

    Also accepts an address that was converted to a `Path` and lost one slash.
    """
    match = _ADDRESS.fullmatch(source)
    return f"{match[1]}://{match[2].rstrip('/')}" if match else None


def local_copy(address: str, progress: Progress) -> Path:
    """Download a model from gs:// or az:// to the cache.

    Small files are downloaded on every call. Weights are downloaded again only if their size, modification time or
    checksum has changed. An interrupted download of weights resumes. The MD5 of the weights is compared with
    checklist.chk, or with the MD5 that the store reports.

    Args:
        address: The remote directory or .gguf file.
        progress: Called with the stage, the bytes done and the total bytes.

    Returns:
        The model's directory in the cache, or its .gguf file.

    Raises:
        ModelNotFoundError: If the address does not contain a model.
        CheckpointError: If a file is damaged.
        LlamaScratchError: If access is denied, or the store or the disk fails.
    """
    import blobfile

    # By default blobfile retries forever and prints to stdout.
    store = blobfile.create_context(retry_limit=_RETRIES, log_callback=lambda message: None)
    with _explaining(address):
        address, files = _listed(store, address)
        weights = {name: stat for name, stat in files.items() if _is_weights(name)}
        base, last = address.rsplit("/", 1)
        single = last in weights
        # Each version of the weights has its own folder, so a file without the .part suffix is up to date.
        version = repr([(name, stat.size, stat.mtime, stat.md5, stat.version) for name, stat in weights.items()])
        name = _plain(base.rsplit("/", 1)[-1] if last == "original" else last)
        kind = f"{name}-{_hash(address)}-"
        folder = user_folder("cache") / "remote" / f"{kind}{_hash(version)}"
        target = folder if single else folder / name / ("original" if last == "original" else "")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not is_ours(folder.stat()):
            raise LlamaScratchError(
                f"Other users can write to {sanitize(folder, 200)}, so it is not used. Remove it and try again."
            )
        with exclusively(folder, sanitize(address, 200)), writing(folder):
            target.mkdir(parents=True, exist_ok=True)
            small = [name for name in files if name not in weights]
            sums = {} if single else _copy_small(store, address, target, small)
            _copy_weights(store, base if single else address, target, weights, sums, progress)
            remove_stale(folder.parent, f"{kind}*")  # other versions, except those that a process is downloading
    return target / last if single else target


def _is_weights(name: str) -> bool:
    return bool(_WEIGHTS.fullmatch(name)) or name.endswith(".gguf")


def _plain(name: str) -> str:
    """Make a folder name from the last part of an address."""
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "model"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _listed(store: Context, address: str) -> tuple[str, dict[str, Stat]]:
    """List the files of a model.

    Args:
        store: The blobfile context.
        address: A .gguf file, or a directory that contains a model's files, an original/ folder or one .gguf file.

    Returns:
        The address of the model's directory, and the status of each file by name.
    """
    if address.endswith(".gguf"):
        return address, {address.rsplit("/", 1)[-1]: store.stat(address)}
    entries = {entry.name: entry for entry in islice(store.scandir(address), _MAX_NAMES)}
    names = [name for name in entries if _SMALL.fullmatch(name) or _WEIGHTS.fullmatch(name)]
    if not any(map(_WEIGHTS.fullmatch, names)):
        if "original" in (name.rstrip("/") for name in entries):
            return _listed(store, f"{address}/original")
        if len(files := sorted(name for name in entries if name.endswith(".gguf"))) == 1:
            return _listed(store, f"{address}/{files[0]}")
        if files:
            raise ModelNotFoundError(
                f"{sanitize(address, 200)} contains {len(files)} models. Choose one of them: {sanitize(files, 200)}."
            )
    if not {"params.json", "config.json"} & set(names):
        raise ModelNotFoundError(
            f"{sanitize(address, 200)} does not contain params.json or config.json. Pass the directory that "
            "contains the model's files, or a .gguf file."
        )
    return address, {name: entries[name].stat or store.stat(f"{address}/{name}") for name in sorted(names)}


def _copy_small(store: Context, address: str, target: Path, names: list[str]) -> dict[str, str]:
    """Download the small files. Returns the MD5s in checklist.chk, if it exists.

    Local files that no longer exist in the store are deleted.
    """
    for path in target.iterdir():
        if path.name not in names and not _is_weights(path.name.removesuffix(".part")):
            path.unlink()
    for name in names:
        with store.BlobFile(f"{address}/{name}", "rb") as file:
            data = file.read(_MAX_SMALL + 1)
        if len(data) > _MAX_SMALL:
            raise CheckpointError(f"{address}/{name} is larger than {_MAX_SMALL:,} bytes. Check the address.")
        if not (target / name).is_file() or (target / name).read_bytes() != data:
            write_atomically(target / name, data, mode=0o666)
    return parse_checklist((target / "checklist.chk").read_bytes()) if "checklist.chk" in names else {}


def _copy_weights(
    store: Context, base: str, target: Path, weights: dict[str, Stat], sums: dict[str, str], progress: Progress
) -> None:
    before, total = 0, sum(stat.size for stat in weights.values())
    for name, stat in weights.items():
        if not (target / name).exists():
            part = target / f"{name}.part"
            require_disk_space(target, name, stat.size - (part.stat().st_size if part.exists() else 0))
            with store.BlobFile(f"{base}/{name}", "rb") as source, part.open("ab") as file:
                source.seek(file.tell())
                while block := source.read(_BLOCK):
                    file.write(block)
                    progress("fetching", before + file.tell(), total)
            _check(part, stat, sums.get(name) or stat.md5, f"{base}/{name}", progress)
            publish(part, target / name)
        before += stat.size


def _check(part: Path, stat: Stat, md5: str | None, address: str, progress: Progress) -> None:
    size = part.stat().st_size
    if size != stat.size or (md5 is not None and file_digest(part, "md5", progress) != md5):
        part.unlink()
        problem = f"has {size:,} of {stat.size:,} bytes" if size != stat.size else f"does not match MD5 {md5}"
        raise CheckpointError(f"The download of {sanitize(address, 200)} {problem} and was deleted. Try again.")


@contextmanager
def _explaining(address: str) -> Iterator[None]:
    """Translate the errors of blobfile and its dependencies into messages."""
    try:
        yield
    except LlamaScratchError:
        raise
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"{sanitize(address, 200)} not found, or these credentials cannot access it. Check the address."
        ) from error
    except Exception as error:  # blobfile has many error classes, most with a short `message`
        reason = sanitize(getattr(error, "message", error), 300)
        raise LlamaScratchError(
            f"{sanitize(address, 200)} cannot be read ({reason}). Check the address, the connection "
            "and the credentials (`gcloud auth application-default login` or `az login`)."
        ) from error
