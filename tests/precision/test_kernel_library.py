"""The kernel library: compiled once, stored safely, verified before use, and never compiled on import."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama_scratch.precision import kernels
from llama_scratch.system.atomic_files import locked
from llama_scratch.system.jobs import BackgroundJobs
from tests.helpers import ROOT
from tests.helpers.processes import until


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_SCRATCH_KERNELS", raising=False)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of the libraries, with nothing loaded and `load_library` replaced."""
    monkeypatch.setattr(kernels, "_loaded", False)
    monkeypatch.setattr(kernels, "_failure", "")
    monkeypatch.setattr(torch.ops, "llama_scratch", SimpleNamespace(machine=lambda: "a test"), raising=False)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    return Path(os.environ["XDG_CACHE_HOME"]) / "llama-scratch" / "kernels"


COMPILER = """#!/bin/sh
case "$*" in *-fsyntax-only*) exit {knows};; esac
echo $$ >> "{log}"
{work}
while [ "$1" != -o ]; do shift; done
echo "a library of $(basename $(dirname $0))" > "$2"
"""


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Use a fake compiler that only logs its call and then runs these commands."""

    def use(work: str = "", knows: int = 0) -> Path:
        path, log = tmp_path / "bin" / f"c++{len(list(tmp_path.glob('bin/*')))}", tmp_path / "log"
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMPILER.format(work=work, knows=knows, log=log))
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return log

    return use


def calls(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def again() -> None:
    """Reset the state, as if in a new process."""
    kernels._loaded, kernels._failure = False, ""


def test_it_is_compiled_once_and_for_its_owner_alone(folder: Path, use: Callable[..., Path]) -> None:
    log = use()
    umask = os.umask(0)
    try:
        assert not kernels.load()
        assert kernels.state().startswith("not compiled yet")
        assert kernels.build()
    finally:
        os.umask(umask)
    (library,) = folder.iterdir()
    assert (library.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    assert kernels.ready()
    again()
    assert not kernels.ready()
    assert kernels.state().startswith("compiled; ")
    assert kernels.load()
    assert kernels.build()
    assert calls(log) == 1


def test_they_can_be_switched_off(folder: Path, use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even after they were loaded."""
    log = use()
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", "0")
    assert (kernels.build(), kernels.load(), kernels.ready(), calls(log)) == (False, False, False, 0)
    assert kernels.state() == "switched off by LLAMA_SCRATCH_KERNELS=0"
    monkeypatch.delenv("LLAMA_SCRATCH_KERNELS")
    assert kernels.build()
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", "0")
    assert (kernels.build(), kernels.load(), kernels.ready()) == (False, False, False)


def test_without_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says once that a compiler would make answers faster."""
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "/nowhere")
    assert kernels.compiler() is None
    for _ in range(2):
        assert kernels.state().startswith("none, because no C++ compiler was found; with one (Debian: ")
        assert not kernels.build()
    assert not folder.exists() or not list(folder.iterdir())


def test_a_compiler_that_is_too_old(folder: Path, use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run only once per day, also by other processes."""
    log = use(knows=1)
    monkeypatch.setattr(kernels, "_candidates", lambda: [os.environ["CXX"]])
    assert kernels.compiler() is None
    assert not kernels.build()
    again()
    assert not kernels.possible()
    assert f"{os.environ['CXX'].split('/')[-1]} does not support C++20" in kernels.state()
    assert calls(log) == 0


HANGS = """#!/bin/sh
echo $$ >> "{log}"
sleep 60 &
echo $! >> "{log}"
{then}
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to look at processes")
@pytest.mark.parametrize("then", ["wait", "exit 1"])
def test_a_compiler_that_hangs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    """Only the background job waits for it, once per day, and no child process remains."""
    log, command = tmp_path / "log", tmp_path / "hanging c++"
    command.write_text(HANGS.format(log=log, then=then))
    command.chmod(0o755)
    monkeypatch.setenv("CXX", shlex.quote(str(command)))
    monkeypatch.setattr(kernels, "_candidates", lambda: [os.environ["CXX"]])
    monkeypatch.setattr(kernels, "_CHECK_TIMEOUT_S", 0.3)
    start = time.monotonic()
    assert kernels.possible()
    assert kernels.state().startswith("not compiled yet")
    assert not log.exists()
    assert not kernels.build()
    again()
    assert not kernels.possible()
    assert not kernels.build()
    assert ("took too long" if then == "wait" else "does not support C++20") in kernels.state()
    assert time.monotonic() - start < 5
    shell, child = map(int, log.read_text().split())  # a single run
    until(lambda: not is_running(shell) and not is_running(child))


def test_a_compiler_that_hangs_makes_way_for_the_next(
    folder: Path, use: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = use()
    monkeypatch.setattr(kernels, "_CHECK_TIMEOUT_S", 0.3)
    hanging = tmp_path / "sleeps"
    hanging.write_text("#!/bin/sh\nsleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(kernels, "_candidates", lambda: [str(hanging), os.environ["CXX"]])
    assert kernels.build()
    assert calls(log) == 1


@pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")
def test_the_next_compiler_is_taken_for_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for named in ("/nowhere/c++", "'", " "):
        monkeypatch.setenv("CXX", named)
        assert kernels.compiler() in ("c++", "g++", "clang++")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (
            "echo 'kernels.cpp:1: note: x' >&2; echo 'kernels.cpp:7: error: why\033[2J' >&2; exit 1",
            "error: why\\x1b[2J",
        ),
        ("kill -9 $$", "it was killed"),
        ("exit 0", "wrote no library"),
    ],
)
def test_a_compiler_that_fails_is_asked_once(folder: Path, use: Callable[..., Path], work: str, said: str) -> None:
    """Once per day, also for other processes. The message contains its error, and no other files remain."""
    log = use(work)
    assert kernels.possible()
    for _ in range(2):
        assert not kernels.build()
        assert not kernels.build()
        assert not kernels.possible()
        assert said in kernels.state()
        assert kernels.state().isprintable()
        again()
    assert calls(log) == 1
    (reason,) = folder.iterdir()
    os.utime(reason, (0, time.time() - 25 * 3600))
    assert kernels.possible()
    assert not kernels.build()
    assert calls(log) == 2
    again()
    use("sleep 0.01")  # a different compiler
    assert kernels.build()


def test_a_job_that_is_ended_ends_the_compiler(folder: Path, use: Callable[..., Path]) -> None:
    log = use("sleep 60")
    background = BackgroundJobs("packing", [(kernels.build, 0), (lambda: None, 1)])
    background.start()
    until(lambda: calls(log) == 1)
    start = time.monotonic()
    background.close()
    assert time.monotonic() - start < 5
    assert background.error is None
    assert not list(folder.iterdir())


def flip(library: Path) -> None:
    data = bytearray(library.read_bytes())
    data[3] ^= 1
    library.write_bytes(data)


def cut(library: Path) -> None:
    os.truncate(library, library.stat().st_size - 1)


def open_to_all(library: Path) -> None:
    library.chmod(0o666)


def link(library: Path) -> None:
    library.rename(library.parent.parent / "elsewhere")
    library.symlink_to("../elsewhere")


def pipe(library: Path) -> None:
    library.unlink()
    os.mkfifo(library)
    os.open(library, os.O_RDWR | os.O_NONBLOCK)  # another process could write to it


@pytest.mark.parametrize("spoil", [flip, cut, open_to_all, link, pipe])
def test_what_is_not_whole_or_not_ours_is_made_again(
    folder: Path, use: Callable[..., Path], spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a library is never loaded."""
    log = use()
    assert kernels.build()
    (library,) = folder.iterdir()
    spoil(library)
    again()
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "load_library", lambda path: pytest.fail("it was loaded"))
        assert kernels.state().startswith("not compiled yet")
        assert not kernels.load()
    assert kernels.build()
    assert calls(log) == 2
    assert [path.is_file() and not path.is_symlink() for path in folder.iterdir()] == [True]


def test_a_library_or_folder_of_someone_else(
    folder: Path, use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not loaded. A new library is compiled in a temporary folder for this process."""
    log = use()
    assert kernels.build()
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    folder.chmod(0o777)
    again()
    assert not kernels.load()
    assert kernels.build()
    assert calls(log) == 2
    assert folder not in loaded[0].parents
    assert not loaded[0].exists()
    folder.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    again()
    assert not kernels.load()


@pytest.mark.parametrize("how", ["no home", "a file"])
def test_without_a_place_to_keep_it(
    folder: Path, use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    log = use()
    if how == "a file":
        folder.parent.mkdir(parents=True)
        folder.write_bytes(b"")
    else:
        monkeypatch.setattr(kernels, "user_folder", lambda kind: (_ for _ in ()).throw(FileNotFoundError()))
    assert not kernels.load()
    assert kernels.build()
    assert calls(log) == 1
    again()
    assert not kernels.load()


def test_a_library_that_cannot_be_loaded_is_made_again(
    folder: Path, use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compiled again once per process, and then reported."""
    log = use()
    assert kernels.build()

    def refuse(path: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr(torch.ops, "load_library", refuse)
    again()
    assert not kernels.build()
    assert not kernels.build()
    assert calls(log) == 2
    assert kernels.state() == "none, because the compiled library could not be loaded"


@pytest.mark.parametrize("change", ["source", "header", "torch", "CPU", "flags"])
def test_what_was_made_from_or_for_something_else_is_not_taken(
    folder: Path, use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    log = use()
    assert kernels.build()
    with monkeypatch.context() as patch:
        if change in ("source", "header"):
            (tmp_path / "cpp").mkdir()
            names = {"source": "kernels.cpp", "header": "cpp/search.h"}
            for name in names.values():
                text = (kernels.SOURCE.parent / name).read_text()
                (tmp_path / name).write_text(text + "\n" * (name == names[change]))
            patch.setattr(kernels, "SOURCE", tmp_path / "kernels.cpp")
        elif change == "torch":
            patch.setattr(torch, "__version__", "2.99.0")
        else:
            patch.setattr(kernels, {"CPU": "_cpu", "flags": "_flags"}[change], lambda: ["other"])
        kernels._key_of.cache_clear()
        again()
        assert not kernels.load()
        assert kernels.build()
        assert calls(log) == 2
    kernels._key_of.cache_clear()
    again()
    assert kernels.load()


def test_the_least_recently_used_go_first(folder: Path, use: Callable[..., Path], tmp_path: Path) -> None:
    """Files of ended processes are removed too, but not files of a running one."""
    use()
    folder.mkdir(parents=True, mode=0o700)
    for age in range(6):
        library = folder / f"kernels-{age}-0.so"
        library.write_bytes(b"old")
        os.utime(library, (1000 - age, 1000 - age))
    left, running = folder / "kernels-a.part", folder / "kernels-b.part"
    left.mkdir()
    running.mkdir()
    (left / "x.so").write_bytes(b"part")
    with locked(running) as ours:
        assert ours
        assert kernels.build()
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if not name.startswith(kernels._key())} == {
        *(f"kernels-{age}-0.so" for age in range(3)),
        "kernels-b.part",
    }
    assert len(names) == 5


def test_what_was_built_with_the_package_is_taken_first(
    folder: Path, use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If it is intact. Like the source next to it, it can belong to another user."""
    log = use()
    package = tmp_path / "package"
    package.mkdir()
    (package / "kernels.cpp").write_text(kernels.SOURCE.read_text())
    monkeypatch.setattr(kernels, "SOURCE", package / "kernels.cpp")
    kernels.compile_into(package).chmod(0o664)
    assert kernels.load()
    again()
    (library,) = package.glob("*.so")
    library.write_bytes(b"damaged")
    assert not kernels.load()
    assert library.exists()
    assert kernels.build()
    assert calls(log) == 2


PROGRAM = """
import sys, threading, torch
from types import SimpleNamespace
torch.ops.llama_scratch = SimpleNamespace(machine=lambda: "a test")
torch.ops.load_library = lambda path: None
from llama_scratch.precision import kernels
thread = threading.Thread(target=lambda: print(kernels.build(), flush=True))
thread.start()
if sys.argv[1:]:
    thread.join()
else:
    import os, time
    from pathlib import Path
    while not Path(os.environ["LOG"]).exists(): time.sleep(0.01)
    print("ends", flush=True)
"""


def program(*arguments: str, log: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env=os.environ | {"LOG": str(log)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_of_two_programs_one_compiles(folder: Path, use: Callable[..., Path]) -> None:
    """Both processes load the library."""
    log = use("sleep 1")
    programs = [program("wait", log=log) for _ in range(2)]
    assert [running.communicate(timeout=60)[0] for running in programs] == ["True\n", "True\n"]
    assert calls(log) == 1
    assert len(list(folder.iterdir())) == 1


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to look at processes")
def test_the_compiler_ends_with_the_program(folder: Path, use: Callable[..., Path]) -> None:
    """The compiler and its child processes run at the lowest priority and end with the program."""
    log = use('sleep 60 & echo $! >> "$0.child"; nice > "$0.nice"; wait')
    running = program(log=log)
    assert running.communicate(timeout=30)[0] == "ends\nFalse\n"
    compiler = Path(os.environ["CXX"])
    assert compiler.with_name(compiler.name + ".nice").read_text() == "19\n"
    processes = [*log.read_text().split(), *compiler.with_name(compiler.name + ".child").read_text().split()]
    until = time.monotonic() + 5
    while any(is_running(int(process)) for process in processes):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not list(folder.iterdir())


def test_a_killed_program_leaves_nothing_that_matters(folder: Path, use: Callable[..., Path]) -> None:
    """The next process compiles immediately, even if the killed one's compiler is still running."""
    log = use("sleep 3")
    running = program("wait", log=log)
    while not log.exists():
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert [path.suffix for path in folder.iterdir()] == [".part"]
    use()
    assert kernels.build()
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_nothing_is_compiled_or_loaded_by_importing(use: Callable[..., Path]) -> None:
    log = use()
    code = "import torch, llama_scratch.llama, llama_scratch.precision.kernels as kernels\n"
    code += "print(kernels.ready(), hasattr(torch.ops.llama_scratch, 'linear'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
    assert calls(log) == 0
