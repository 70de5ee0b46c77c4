"""Memory limits of the process count like the machine's memory. A limit that is too low is an error (exit code 5)."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_scratch.checkpoint.base import reading
from llama_scratch.checkpoint.meta.pickle_file import load_pth
from llama_scratch.errors import OutOfMemoryError
from llama_scratch.system.memory import MemoryLimit, _cgroups, is_memory_error, memory_limit
from llama_scratch.system.progress import silent

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's")


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_version_2_counts_every_group_above_and_gives_up_cached_files(tmp_path: Path) -> None:
    """ "max" means unlimited; memory.high takes effect before memory.max."""
    membership, root = tmp_path / "membership", tmp_path / "root"
    membership.write_text("0::/a/b\n")
    stat = "anon 100\ninactive_file 300"
    group(root / "a" / "b", memory__max="max", memory__high="max", memory__current="500", memory__stat=stat)
    group(root / "a", memory__max="1000000000", memory__high="900000000", memory__current="500", memory__stat=stat)
    assert list(_cgroups(membership, root)) == [
        MemoryLimit(1_000_000_000 - 200, "a limit of 1.0 GB (memory.max)"),
        MemoryLimit(900_000_000 - 200, "a limit of 0.9 GB (memory.high)"),
    ]


def test_version_1_counts_the_memory_controller_only(tmp_path: Path) -> None:
    """Its largest number means unlimited. If usage exceeds a limit, 0 bytes are free."""
    membership, root = tmp_path / "membership", tmp_path / "root"
    membership.write_text("5:cpu,memory:/a\n3:pids:/a\n0::/\n")
    stat = "inactive_file 7\ntotal_inactive_file 300"
    files = {"memory__usage_in_bytes": "500", "memory__stat": stat}
    group(root / "memory" / "a", memory__limit_in_bytes="100", **files)
    group(root / "memory", memory__limit_in_bytes="9223372036854771712", **files)
    assert list(_cgroups(membership, root)) == [MemoryLimit(0, "a limit of 0.0 GB (memory.limit_in_bytes)")]


def test_no_groups_are_no_limit(tmp_path: Path) -> None:
    """On other systems."""
    assert list(_cgroups(tmp_path / "none", tmp_path)) == []


@pytest.mark.parametrize(("kind", "name"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_a_resource_limit_leaves_what_is_not_yet_taken(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    """The limit minus the usage that the kernel reports."""
    status = Path("/proc/self/status").read_text()
    taken = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(name)))
    real = resource.getrlimit
    limit = taken + 50_000_000
    monkeypatch.setattr(
        "resource.getrlimit", lambda which: (limit, limit) if which == getattr(resource, kind) else real(which)
    )
    found = memory_limit()
    assert found.limit == f"a limit of {limit / 1e9:.1f} GB ({kind})"
    assert abs(found.free - 50_000_000) < 10_000_000


def test_want_of_memory_is_recognized_whoever_says_it() -> None:
    """Other errors are not."""
    assert is_memory_error(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert is_memory_error(OSError(12, "Cannot allocate memory"))
    assert is_memory_error(RuntimeError("can't start new thread"))
    assert not is_memory_error(OSError(28, "No space left on device"))
    assert not is_memory_error(ImportError("No module named 'torch'"))


def test_a_model_file_that_cannot_be_mapped_is_want_of_memory(tmp_path: Path) -> None:
    """It is not reported as missing or unreadable."""
    said = r"model\.gguf does not fit into this machine's memory: .* GB are free"
    with pytest.raises(OutOfMemoryError, match=said), reading(tmp_path / "model.gguf"):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_a_limit_in_which_torch_cannot_be_read_is_a_sentence(tiny_dir: Path) -> None:
    """The error names the limit."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (200_000_000,) * 2); "
        "from llama_scratch.__main__ import main; main()"
    )
    command = [sys.executable, "-c", code, "--model-dir", str(tiny_dir), "--prompt", "the"]
    found = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout) == (5, "")
    assert "under a limit of 0.2 GB (RLIMIT_AS). Raise it" in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_file_that_a_limit_keeps_from_being_mapped_is_not_called_damaged(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 2471675547 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", no_room)
    with pytest.raises(OutOfMemoryError, match=r"2\.5 GB more were requested"):
        load_pth(tiny_dir / "consolidated.00.pth", silent)
