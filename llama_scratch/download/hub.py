"""Resumable downloads from the Hugging Face Hub to its local cache."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.checkpoint.fields import read_object
from llama_scratch.checkpoint.recognize import complete_model, gguf_files
from llama_scratch.download.http import RefusedError, RetryPolicy, exclusively, fetch, open_session, writing
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError, sanitize
from llama_scratch.system.hashing import file_digest
from llama_scratch.system.progress import Progress
from llama_scratch.system.small_files import read_text

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART})/({_PART})(?:@([\w.-]{{1,100}}(?:/[\w.-]{{1,100}}){{0,4}}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_SMALL = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json"
    r"|chat_template\.\w+|LICENSE\S*|README\.md",
    re.IGNORECASE,
)
_META = re.compile(r"original/(params\.json|tokenizer\.model|checklist\.chk|consolidated\.\d\d\.pth)")


@dataclass(frozen=True)
class Repository:
    """A model on the hub: OWNER/REPO, and its revision (a branch, a tag or a commit)."""

    id: str
    revision: str = "main"

    @classmethod
    def named(cls, name: str) -> Repository | None:
        """Parse "OWNER/REPO" or "OWNER/REPO@REVISION". Returns None for any other string."""
        match = _NAME.fullmatch(name)
        if match is None or ".." in name or "--" in f"{match[1]}/{match[2]}":
            return None
        return cls(f"{match[1]}/{match[2]}", match[3] or "main")

    @property
    def name(self) -> str:
        """The name as a user types it."""
        return self.id if self.revision == "main" else f"{self.id}@{self.revision}"

    @property
    def folder(self) -> Path:
        """The repository's folder in the hub's cache.

        Source: huggingface_hub's "Understand caching".
        """
        return cache() / f"models--{self.id.replace('/', '--')}"

    @property
    def path(self) -> Path | None:
        """The model's directory in the cache, or None. Does not access the network."""
        try:
            commit = self.revision
            if not _COMMIT.fullmatch(commit):
                commit = read_text(self.folder / "refs" / self.revision, 100).strip()
            return _model_in(self.folder / "snapshots" / commit) if _COMMIT.fullmatch(commit) else None
        except (OSError, CheckpointError):
            return None


def cache() -> Path:
    """The hub's local cache, shared with other programs.

    Raises FileNotFoundError if there is no home directory. Source: huggingface_hub's environment variables.
    """
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    place = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    path = os.path.expandvars(os.path.expanduser(place))
    if path.startswith("~"):
        raise FileNotFoundError(errno.ENOENT, "no home directory; set HOME or HF_HOME")
    return Path(path).absolute()


def _model_in(snapshot: Path) -> Path | None:
    """Return the path of the model in a snapshot, or None.

    If there are several .gguf files, return the snapshot. Loading it raises an error that lists the files.
    """
    if model := complete_model(snapshot):
        return model.path
    return snapshot if gguf_files(snapshot) else None


def pull_hub(
    repository: Repository, progress: Progress, say: Callable[[str], None], retry: RetryPolicy | None = None
) -> Path:
    """Download a model's required files to the hub's cache.

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE have the same meaning as in huggingface_hub.

    Args:
        repository: The model.
        progress: Called with the stage, the bytes done and the total bytes.
        say: Called with a line about the size and the license before any file is downloaded.
        retry: When to retry and when to give up.

    Returns:
        The model's directory.

    Raises:
        ModelNotFoundError: If the repository or the revision does not exist or is private.
        CheckpointError: If the repository has no supported weights, or a downloaded file is damaged.
        LlamaScratchError: If access is denied, or the connection or the disk fails.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise LlamaScratchError(
            f"Downloading {repository.name} requires the package huggingface_hub. "
            'Run `pip install ".[hub]"` in a clone of llama-scratch, or `pip install huggingface_hub`.'
        ) from None
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    disable_progress_bars()  # `progress` replaces them
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if constants.HF_HUB_OFFLINE and (here := repository.path):
        return here
    with _explaining(repository):
        info = _info(repository)
        commit, siblings = info.sha or "", {file.rfilename: file for file in info.siblings or []}
        files = [siblings[name] for name in _wanted(repository, list(siblings))]
        snapshot = repository.folder / "snapshots" / commit
        size = sum(file.size or 0 for file in files)
        say(f"{repository.name}: {size / 1e9:.2g} GB, license: {_license(info)}")
        with exclusively(repository.folder / "blobs", repository.name):
            _fetch_files(repository, commit, snapshot, files, progress, retry or RetryPolicy())
            # A request by revision also writes the commit to refs/, where `Repository.path` looks it up.
            _download(repository, files[0].rfilename, repository.revision)
    path = _model_in(snapshot)
    if path is None or repository.path != path:
        raise LlamaScratchError(f"{repository.name} changed during the download. Try again.")
    return path


def _info(repository: Repository) -> ModelInfo:
    """Request a repository's metadata from the hub: commit, files and model card."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repository.id, revision=repository.revision, files_metadata=True)
        files: list[Any] = info.siblings or []
        named = all(isinstance(file.rfilename, str) and isinstance(file.size, int | None) for file in files)
        if _COMMIT.fullmatch(info.sha or "") and named and hasattr(info.card_data or {}, "get"):
            return info
    except HfHubHTTPError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # not a valid response from the hub
        pass
    raise LlamaScratchError(f"{constants.ENDPOINT} does not respond like the Hugging Face Hub. Check HF_ENDPOINT.")


def _wanted(repository: Repository, names: list[str]) -> list[str]:
    """Select the files to download, small files first."""
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    if "model.safetensors" in weights:  # takes precedence over shards, as in transformers
        weights = ["model.safetensors"]
    if weights and "config.json" in names:
        small = [name for name in names if _SMALL.fullmatch(name)]
        return sorted(small, key=lambda name: name != "config.json") + sorted(weights)
    meta = [name for name in names if _META.fullmatch(name)]
    if "original/consolidated.00.pth" in meta:
        text = [name for name in names if re.fullmatch(r"LICENSE\S*|README\.md", name)]
        return sorted(meta, key=lambda name: (name.endswith(".pth"), name)) + text
    if any(name.endswith(".gguf") for name in names):
        raise CheckpointError(
            f"{repository.name} contains GGUF files instead of safetensors. Download one of them with "
            f"`hf download {repository.id} FILE.gguf` and pass its path as `source`."
        )
    other = next((name for name in names if re.search(r"\.(bin|pth?|h5|msgpack|onnx|safetensors)$", name)), None)
    content = f"weights only as {sanitize(other)}" if other else "no weights"
    raise CheckpointError(
        f"{repository.name} must contain config.json and model.safetensors, but contains {content}. Choose another "
        "repository or revision of the model."
    )


def _license(info: ModelInfo) -> str:
    card: Any = info.card_data or {}
    name = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return sanitize(name) if name else "not stated"


def _fetch_files(
    repository: Repository,
    commit: str,
    snapshot: Path,
    files: list[RepoSibling],
    progress: Progress,
    retry: RetryPolicy,
) -> None:
    """Download all files to the cache.

    Large files, for which the hub has a SHA-256, are downloaded with `fetch`: huggingface_hub restarts an interrupted
    download from the beginning (as of version 2.4) and does not verify checksums.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    session = open_session(constants.ENDPOINT)
    before, total = 0, sum(file.size or 0 for file in files)
    for file in files:
        name, size = file.rfilename, file.size or 0
        if not (snapshot / name).exists():
            sha256 = file.lfs.sha256 if file.lfs else ""
            blob = repository.folder / "blobs" / sha256
            if _SHA256.fullmatch(sha256) and not blob.exists():

                def report(done: int, _: int, before: int = before) -> None:
                    progress("fetching", before + done, total)

                def is_whole(part: Path, sha256: str = sha256) -> bool:
                    return file_digest(part, "sha256", progress) == sha256

                url = hf_hub_url(repository.id, name, revision=commit, endpoint=constants.ENDPOINT)
                fetch(session, url, blob, is_whole=is_whole, report=report, retry=retry, headers=build_hf_headers())
            _download(repository, name, commit)
        if name == "config.json":
            _check_architecture(repository, snapshot / name)
        before += size
        progress("fetching", before, total)


def _download(repository: Repository, file: str, revision: str) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(repository.id, file, revision=revision, cache_dir=cache())


def _check_architecture(repository: Repository, path: Path) -> None:
    """Reject an unsupported architecture before the weights are downloaded.

    All other checks run when the model is loaded.
    """
    from llama_scratch.checkpoint.huggingface.reader import unsupported

    if (reason := unsupported(read_object(path, required=True))) is not None:
        raise CheckpointError(
            f"The config.json of {repository.name} says {reason}, so the weights were not downloaded. Choose another "
            "model."
        )


@contextmanager
def _explaining(repository: Repository) -> Iterator[None]:
    """Translate the hub's errors into messages that say what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    name, page = repository.name, f"{constants.ENDPOINT}/{repository.id}"
    gated = (
        f"{name} is gated: you must accept its license first. Accept it on {page}, wait for the email that grants "
        "access, then run `hf auth login` (or set HF_TOKEN) and pull it again."
    )
    try:
        with writing(repository.folder):
            try:
                yield
            except hub.OfflineModeIsEnabled:
                raise ModelNotFoundError(
                    f"{name} cannot be downloaded while HF_HUB_OFFLINE is set. Unset it and pull it again."
                ) from None
            except hub.GatedRepoError:
                raise LlamaScratchError(gated) from None
            except hub.RevisionNotFoundError:
                raise ModelNotFoundError(
                    f"{repository.id} does not have the revision '{repository.revision}'. See {page}/commits."
                ) from None
            except hub.RepositoryNotFoundError:
                raise ModelNotFoundError(
                    f"The repository {repository.id} does not exist at {constants.ENDPOINT}, or is private. Check the "
                    "name, or run `hf auth login` (or set HF_TOKEN)."
                ) from None
            except hub.HfHubHTTPError as error:
                status = error.response.status_code
                raise (_not_allowed(name) if status in (401, 403) else _out_of_order(status)) from None
            except RefusedError as error:
                if error.status in (401, 403):
                    raise LlamaScratchError(gated) from None
                raise
            except hub.LocalEntryNotFoundError as error:  # raised if a request fails
                raise _no_connection(name) from error
            except OSError as error:
                if error.errno is not None:
                    raise
                raise LlamaScratchError(
                    f"The files of {name} do not match the hub's metadata. Check HF_ENDPOINT and pull it again."
                ) from error
    except LlamaScratchError:
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "ssl", "socket"):
            raise _no_connection(name) from error
        raise


def _not_allowed(name: str) -> LlamaScratchError:
    return LlamaScratchError(
        f"The access token does not grant access to {name}. Run `hf auth login` with a token that can read gated "
        "repositories (or set HF_TOKEN) and pull it again."
    )


def _out_of_order(status: int) -> LlamaScratchError:
    return LlamaScratchError(f"The hub responded with HTTP status {status}. Try again later.")


def _no_connection(name: str) -> LlamaScratchError:
    return LlamaScratchError(
        f"No connection to the hub, so {name} was not downloaded. Check the network and pull it again. The "
        "download resumes."
    )
