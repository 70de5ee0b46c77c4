"""No code from a model runs.

Models of every format with embedded code are opened under an audit hook.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_scratch.checkpoint.convert import convert
from llama_scratch.system.progress import silent
from tests.helpers.checkpoints import write_meta
from tests.helpers.gguf_files import string, whole_file
from tests.helpers.meta_files import Danger

# Runs in a separate process, because an audit hook cannot be removed. After torch is imported, the hook reports started
# programs, network connections, changed files and pickles that load planted names. The only program that may start is
# the chat template sandbox, whose rendering also runs in this process to be observed.
PROBE = """
import json, sys
from llama_scratch import Llama, Message
import torch, safetensors.torch
from llama_scratch.system import template_sandbox
import llama_scratch.checkpoint.meta.reader, llama_scratch.checkpoint.huggingface.reader
import llama_scratch.checkpoint.gguf.reader
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile",
             "subprocess.Popen", "socket.connect", "pty.spawn", "os.putenv", "shutil.rmtree", "os.remove", "os.rename")
seen = []
template_sandbox._warm_up()
def hook(event, arguments):
    program = "llama_scratch.system.template_sandbox"
    if event == "subprocess.Popen" and arguments[0] == sys.executable and program in str(arguments[1]):
        return
    if event in FORBIDDEN or (event == "pickle.find_class" and "evil" in str(arguments)) or (
            event == "import" and "evil" in str(arguments[0])):
        seen.append([event, repr(arguments)])
sys.addaudithook(hook)
found = {}
for path in sys.argv[1:]:
    try:
        llama = Llama.load(path, precision="fp32")
        llama.predict("the")
        found[path] = "answered"
        if hasattr(llama.chat, "source"):
            template_sandbox.answer_to(llama.chat.source, [], [{"role": "user", "content": "Hi"}], {})
        llama.encode_chat([Message("user", "Hi")])
    except Exception as error:
        found[path] = found.get(path, "") + f" {type(error).__name__}: {error}"
print(json.dumps({"seen": seen, "found": found}))
"""
ESCAPES = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch PROOF') }}"


def meta(directory: Path, proof: Path) -> None:
    torch.save({"norm.weight": Danger(os.system, f"touch {proof}")}, directory / "consolidated.00.pth")


def meta_protocol_0(directory: Path, proof: Path) -> None:
    (directory / "consolidated.00.pth").write_bytes(pickle.dumps(Danger(os.system, f"touch {proof}"), 0))


def evil_module(directory: Path, proof: Path) -> dict[str, object]:
    (directory / "evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    return {"trust_remote_code": True, "auto_map": dict.fromkeys(("AutoConfig", "AutoTokenizer"), "evil.Evil")}


def change(path: Path, fields: dict[str, object]) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | fields))


def code_of_its_own(directory: Path, proof: Path) -> None:
    fields = evil_module(directory, proof)
    change(directory / "config.json", fields)
    change(directory / "tokenizer_config.json", fields | {"tokenizer_class": "evil.Evil"})


def chat_template(directory: Path, proof: Path) -> None:
    change(directory / "tokenizer_config.json", {"chat_template": ESCAPES.replace("PROOF", str(proof))})


def pickle_as_safetensors(directory: Path, proof: Path) -> None:
    torch.save({"norm.weight": Danger(os.system, f"touch {proof}")}, directory / "model.safetensors")


def pickle_instead_of_safetensors(directory: Path, proof: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"norm.weight": Danger(os.system, f"touch {proof}")}, directory / "pytorch_model.bin")


def index_that_climbs(directory: Path, proof: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    names = ["model.norm.weight", "model.embed_tokens.weight"]
    change(
        directory / "model.safetensors.index.json",
        {"weight_map": dict.fromkeys(names, "../outside.safetensors"), "metadata": {"total_size": 0}},
    )


Fill = Callable[[Path, Path], None]
PLACES: dict[str, tuple[str, Fill, str]] = {
    "pickle in .pth": ("meta", meta, "Do not use this file"),
    "pickle without an archive": ("meta", meta_protocol_0, "CheckpointError"),
    "auto_map and evil.py": ("hf", code_of_its_own, "answered"),
    "chat template": ("hf", chat_template, "chat template fails"),
    "pickle named safetensors": ("hf", pickle_as_safetensors, "CheckpointError"),
    "pytorch_model.bin": ("hf", pickle_instead_of_safetensors, "Error"),
    "index with a path that climbs": ("hf", index_that_climbs, "CheckpointError"),
}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], list[list[str]]]:
    """The file that embedded code would create, results, and the hook's reports."""
    folder = tmp_path_factory.mktemp("code")
    proof = folder / "proof"
    paths: dict[str, Path] = {}
    for number, (place, (form, fill, _)) in enumerate(PLACES.items()):
        paths[place] = folder / str(number) / "Model"
        source = write_meta(folder / str(number) / "source")
        if form == "meta":
            source.rename(paths[place])
        else:
            convert(source, paths[place], form, silent)
        fill(paths[place], proof)
    template = string(ESCAPES.replace("PROOF", str(proof)))
    paths["gguf chat template"] = whole_file().set("tokenizer.chat_template", template).write(folder / "a.gguf")
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, paths.values())], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    return proof, {place: told["found"][str(path)] for place, path in paths.items()}, told["seen"]


@pytest.mark.parametrize("place", [*PLACES, "gguf chat template"])
def test_code_in_a_model_is_refused_or_ignored(
    probed: tuple[Path, dict[str, str], list[list[str]]], place: str
) -> None:
    expected = PLACES[place][2] if place in PLACES else "chat template fails"
    assert expected in probed[1][place]


def test_no_code_ran_and_no_program_was_started(probed: tuple[Path, dict[str, str], list[list[str]]]) -> None:
    proof, _, seen = probed
    assert seen == []
    assert not proof.exists()


def test_the_hook_would_have_seen_it(tmp_path: Path) -> None:
    """An unsafe load of the same pickle is reported by the hook and creates the file."""
    proof = tmp_path / "proof"
    torch.save(Danger(os.system, f"touch {proof}"), tmp_path / "a.pth")
    careless = PROBE.replace(
        "llama = Llama.load(path", "torch.load(path, weights_only=False)\n        llama = str(path"
    )
    run = subprocess.run([sys.executable, "-c", careless, str(tmp_path / "a.pth")], capture_output=True, text=True)
    assert json.loads(run.stdout)["seen"][0][0] == "os.system"
    assert proof.exists()
