"""Find the model at a path, or describe the files that are there instead."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.convert import convert
from llama_scratch.checkpoint.recognize import FoundModel, recognize
from llama_scratch.checkpoint.verify import verify
from llama_scratch.download.hub import Repository
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError
from llama_scratch.system.progress import silent
from tests.helpers.assertions import assert_rejected
from tests.helpers.checkpoints import PAGE, POINTER, tiny_params, write_meta

COMMIT = "a" * 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small model in the three formats: meta/, hf/ and model.gguf. Read only."""
    folder = tmp_path_factory.mktemp("models")
    write_meta(folder / "meta", params=tiny_params(n_layers=1, dim=128, n_heads=2, n_kv_heads=1))
    convert(folder / "meta", folder / "hf", "hf")
    convert(folder / "meta", folder / "model.gguf", "gguf")
    return folder


def copy(source: Path, destination: Path) -> Path:
    """Copy a file or a directory, and create parent directories."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(source, destination) if source.is_dir() else shutil.copy(source, destination))


def make(models: Path, folder: Path, *, hub: str = "hf") -> Path:
    """Create the Hugging Face cache folder of a repository with one revision."""
    repository = folder / "models--meta-llama--Llama-3.2-1B"
    copy(models / hub, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


# --- Paths of a model --------------------------------------------------------------------------


def one_gguf(models: Path, folder: Path) -> tuple[Path, Path]:
    return folder, copy(models / "model.gguf", folder / "a-Q8_0.gguf")


def gguf_beside_config(models: Path, folder: Path) -> tuple[Path, Path]:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return one_gguf(models, folder)


def blob(models: Path, folder: Path) -> tuple[Path, Path]:
    path = copy(models / "model.gguf", folder / "sha256-9999d4734")
    return path, path


def hub_cache(models: Path, folder: Path) -> tuple[Path, Path]:
    repository = make(models, folder)
    return repository, repository / "snapshots" / COMMIT


def hub_cache_without_refs(models: Path, folder: Path) -> tuple[Path, Path]:
    repository, snapshot = hub_cache(models, folder)
    shutil.rmtree(repository / "refs")
    return repository, snapshot


def stray_params(models: Path, folder: Path) -> tuple[Path, Path]:
    directory = copy(models / "hf", folder / "hf")
    shutil.copy(models / "meta" / "params.json", directory)
    return directory, directory


def stray_config(models: Path, folder: Path) -> tuple[Path, Path]:
    shutil.copy(models / "hf" / "config.json", folder)
    return folder, copy(models / "meta", folder / "original")


def pytorch_beside_original(models: Path, folder: Path) -> tuple[Path, Path]:
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    return stray_config(models, folder)


def named_file(directory: str, file: str) -> Callable[[Path, Path], tuple[Path, Path]]:
    def build(models: Path, folder: Path) -> tuple[Path, Path]:
        return models / directory / file, models / directory

    return build


MEANT = {
    "one gguf": one_gguf,
    "gguf beside config.json": gguf_beside_config,
    "gguf without its ending": blob,
    "hub cache": hub_cache,
    "hub cache without refs": hub_cache_without_refs,
    "stray params.json": stray_params,
    "stray config.json": stray_config,
    "pytorch_model.bin and original": pytorch_beside_original,
    **{file: named_file("hf", file) for file in ("model.safetensors", "config.json", "tokenizer.json")},
    **{file: named_file("meta", file) for file in ("consolidated.00.pth", "params.json", "tokenizer.model")},
}


@pytest.mark.parametrize("build", MEANT.values(), ids=MEANT)
def test_a_path_that_means_a_model(
    models: Path, tmp_path: Path, build: Callable[[Path, Path], tuple[Path, Path]]
) -> None:
    """Opened, verified and converted in the same way; recognizing twice changes nothing."""
    named, expected = build(models, tmp_path)
    model = recognize(named)
    assert model.path == expected
    assert recognize(expected) == model
    assert open_checkpoint(named).files == open_checkpoint(expected).files
    assert verify(named).wrong == 0
    assert verify(named).path == expected


@pytest.mark.parametrize(
    ("file", "format"), [("params.json", "meta"), ("consolidated.00.pth", "meta"), ("model.safetensors", "huggingface")]
)
def test_of_two_formats_the_named_file_decides(models: Path, tmp_path: Path, file: str, format: str) -> None:
    for directory in ("meta", "hf"):
        shutil.copytree(models / directory, tmp_path, dirs_exist_ok=True)
    assert recognize(tmp_path / file) == FoundModel(format, tmp_path)  # type: ignore[arg-type]
    assert recognize(tmp_path).format == "meta"


def test_convert_takes_what_the_others_take(models: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "LICENSE").write_text("Llama 3.2")
    copy(models / "meta", tmp_path / "repository" / "original")
    converted = convert(tmp_path / "repository", tmp_path / "hf", "hf").path
    assert (converted / "LICENSE").read_text() == "Llama 3.2"
    assert open_checkpoint(converted).args == open_checkpoint(models / "meta").args


def test_a_model_that_was_split(models: Path, tmp_path: Path) -> None:
    """Two files are one model, named by the first one."""
    for number in (1, 2):
        copy(models / "model.gguf", tmp_path / f"a-0000{number}-of-00002.gguf")
    assert recognize(tmp_path) == FoundModel("gguf", tmp_path / "a-00001-of-00002.gguf")


def test_a_gguf_repository_in_the_hubs_cache(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf download OWNER/REPO FILE.gguf`, then --model OWNER/REPO."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = make(models, tmp_path)
    snapshot = repository / "snapshots" / COMMIT
    shutil.rmtree(snapshot)
    file = copy(models / "model.gguf", snapshot / "a.gguf")
    assert Repository("meta-llama/Llama-3.2-1B").path == file
    copy(file, snapshot / "b.gguf")
    with pytest.raises(ModelNotFoundError, match=r"2 models.*a\.gguf, .*b\.gguf"):
        recognize(Repository("meta-llama/Llama-3.2-1B").path or tmp_path)


# --- Paths without a model ---------------------------------------------------------------------


def rejected_by_all(path: Path, error: type[LlamaScratchError], *words: str) -> None:
    """Check that every command that takes a model rejects it in the same way, and names the path."""
    commands: list[Callable[[], object]] = [
        lambda: open_checkpoint(path),
        lambda: verify(path),
        lambda: convert(path, path.parent / "out", "hf"),
    ]
    for command in commands:
        assert_rejected(command, error, path, *words)


def test_several_models_are_listed(models: Path, tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        copy(models / "model.gguf", tmp_path / "both" / name)
    rejected_by_all(tmp_path / "both", ModelNotFoundError, "2 models", "a-Q4_0.gguf", "a-Q8_0.gguf")


def test_the_directory_above_models_lists_them(models: Path, tmp_path: Path) -> None:
    """For Meta's downloads and for the Hugging Face cache."""
    above = tmp_path / "checkpoints"
    copy(models / "meta", above / "Llama3.2-1B")
    rejected_by_all(above, ModelNotFoundError, "Llama3.2-1B")
    make(models, above)
    rejected_by_all(above, ModelNotFoundError, "2 models", "Llama3.2-1B", "models--meta-llama--Llama-3.2-1B")


def test_several_revisions_are_listed(models: Path, tmp_path: Path) -> None:
    repository = make(models, tmp_path)
    copy(models / "hf", repository / "snapshots" / ("b" * 40))
    assert recognize(repository).path.name == COMMIT
    (repository / "refs" / "main").unlink()
    rejected_by_all(repository, ModelNotFoundError, COMMIT, "b" * 40)


def test_ollamas_store_lists_its_models(models: Path, tmp_path: Path) -> None:
    (tmp_path / "store" / "manifests").mkdir(parents=True)
    copy(models / "model.gguf", tmp_path / "store" / "blobs" / "sha256-1234")
    (tmp_path / "store" / "blobs" / "sha256-5678").write_text("a template")
    rejected_by_all(tmp_path / "store", ModelNotFoundError, "sha256-1234")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"},
            ("LoRA adapter", "meta-llama/Llama-3.2-1B"),
        ),
        ({"peft_type": "IA3"}, ("PEFT adapter (IA3)",)),
        ({"model": "mlx-community/Llama", "fine_tune_type": "lora"}, ("LoRA adapter", "mlx-community/Llama")),
    ],
)
def test_an_adapter_names_its_base_model(tmp_path: Path, config: dict[str, str], words: tuple[str, ...]) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    (directory / "tokenizer.json").write_text("{}")
    rejected_by_all(directory, CheckpointError, *words)
    with pytest.raises(CheckpointError, match="adapter"):
        recognize(directory / "adapter_model.safetensors")


FILES = {
    "model.onnx": "ONNX",
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "weights.npz": "MLX",
    "llama.pte": "ExecuTorch",
    "weights.pt": "PyTorch",
    "other.safetensors": "config.json",
}


@pytest.mark.parametrize("file", FILES)
def test_another_format_is_named(tmp_path: Path, file: str) -> None:
    """Both for the directory and for the file itself."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / file).write_bytes(b"\x08\x07\x12\x07")
    rejected_by_all(tmp_path / "model", CheckpointError, FILES[file], file)
    rejected_by_all(tmp_path / "model" / file, CheckpointError, FILES[file])


def test_pytorch_weights_are_named(models: Path, tmp_path: Path) -> None:
    directory = copy(models / "hf", tmp_path / "hf")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    (directory / "flax_model.msgpack").write_bytes(b"\0")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*transformers"):
        open_checkpoint(directory)


def test_old_quantizations_are_named(models: Path, tmp_path: Path) -> None:
    """Early AutoGPTQ and AWQ had their settings in a separate file."""
    directory = copy(models / "hf", tmp_path / "hf")
    (directory / "quantize_config.json").write_text('{"bits": 4}')
    with pytest.raises(CheckpointError, match="GPTQ"):
        open_checkpoint(directory)


def test_a_quantization_of_mlx_is_named(models: Path, tmp_path: Path) -> None:
    directory = copy(models / "hf", tmp_path / "hf")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 64, "bits": 4}}))
    with pytest.raises(CheckpointError, match="MLX"):
        open_checkpoint(directory)


def test_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.write(tmp_path / "a", "a")
    with tarfile.open(tmp_path / "model.tar", "w") as tar:
        tar.add(tmp_path / "a", "a")
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "a", "a")
    for name, kind in [("model.zip", "zip"), ("model.tar", "tar"), ("model.tar.gz", "gzip")]:
        rejected_by_all(tmp_path / name, CheckpointError, f"{kind} archive", "Unpack")


def test_nothing_that_is_a_model(tmp_path: Path) -> None:
    """An empty directory, only a tokenizer, other files; an empty file, and one of another kind."""
    for name in ("empty", "tokenizer", "other"):
        (tmp_path / name).mkdir()
    rejected_by_all(tmp_path / "empty", ModelNotFoundError, "empty directory")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    rejected_by_all(tmp_path / "tokenizer", ModelNotFoundError, "tokenizer.json", "without a model")
    (tmp_path / "other" / "notes.txt").write_text("a")
    rejected_by_all(tmp_path / "other", ModelNotFoundError, "not hold a model", "notes.txt")
    (tmp_path / "file").write_bytes(b"")
    rejected_by_all(tmp_path / "file", CheckpointError, "empty file")
    rejected_by_all(tmp_path / "other" / "notes.txt", CheckpointError, "b'a'")
    rejected_by_all(Path("/dev/zero"), CheckpointError, "device")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("name", ["pipe", "model.gguf"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="pipe"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["n" * 300, "params.json/model"])
def test_a_path_that_no_file_can_have(models: Path, name: str) -> None:
    """Too long, or below a file: missing, not an error of the operating system."""
    with pytest.raises(ModelNotFoundError):
        open_checkpoint(models / "meta" / name)
    with pytest.raises(ModelNotFoundError):
        verify(models / "meta" / name)


# --- Stand-ins in each format -----------------------------------------------------------------


@pytest.mark.parametrize(("content", "says"), [(POINTER, "git-lfs"), (PAGE, "web page")], ids=["pointer", "page"])
@pytest.mark.parametrize(
    "file",
    [
        "model.gguf",
        "meta/consolidated.00.pth",
        "meta/params.json",
        "meta/tokenizer.model",
        "hf/model.safetensors",
        "hf/config.json",
        "hf/tokenizer.json",
        "hf/tokenizer_config.json",
    ],
)
def test_a_stand_in_is_named_in_every_format(
    models: Path, tmp_path: Path, file: str, content: bytes, says: str
) -> None:
    top = copy(models / file.split("/")[0], tmp_path / file.split("/")[0])
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(top).load(silent)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    "file",
    ["meta/params.json", "meta/tokenizer.model", "hf/config.json", "hf/tokenizer.json", "hf/tokenizer_config.json"],
)
def test_a_byte_order_mark_in_any_small_file(models: Path, tmp_path: Path, file: str) -> None:
    top = copy(models / file.split("/")[0], tmp_path / file.split("/")[0])
    (tmp_path / file).write_bytes(b"\xef\xbb\xbf" + (tmp_path / file).read_bytes())
    assert open_checkpoint(top).args == open_checkpoint(models / file.split("/")[0]).args


@pytest.mark.parametrize("file", ["model.gguf", "meta/consolidated.00.pth", "hf/model.safetensors"])
def test_weights_that_were_removed_are_missing(models: Path, tmp_path: Path, file: str) -> None:
    """Between opening and loading: exit code 3, as for a model that never existed."""
    checkpoint = open_checkpoint(copy(models / file.split("/")[0], tmp_path / file.split("/")[0]))
    (tmp_path / file).unlink()
    with pytest.raises(ModelNotFoundError, match=Path(file).name) as caught:
        checkpoint.load(silent)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("file", ["hf/config.json", "hf/tokenizer.json", "meta/params.json", "meta/tokenizer.model"])
def test_a_small_file_that_was_removed_is_missing(
    models: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same between two accesses to it."""
    top = copy(models / file.split("/")[0], tmp_path / file.split("/")[0])
    monkeypatch.setattr(Path, "is_file", lambda self: self == tmp_path / file or os.path.isfile(self))
    (tmp_path / file).unlink()
    with pytest.raises(ModelNotFoundError, match=Path(file).name):
        open_checkpoint(top)
