"""Compile `kernels.cpp` with the machine's C++ compiler, once, and load the library from the user's cache.

Nothing is compiled or loaded before `build` or `load` is called. Without a compiler, torch's own operators do the work.
A library's name contains a hash of its inputs (the source, torch, the CPU, the flags) and its own checksum, because a
damaged library could crash the process. The compiler is not part of the hash: all compilers produce the same bits, and
a library may outlive its compiler.

    kernels-<key>-<sha256>.so    a complete library that no other user can write
    kernels-<key>.failed         the reason why compiling failed
    kernels-<key>.part/          the folder in which one process compiles while the others wait for its library
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import secrets
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from llama_scratch.errors import sanitize
from llama_scratch.system.atomic_files import NO_LINK, locked, publish, remove_stale
from llama_scratch.system.folders import is_ours, trim_folder, user_folder
from llama_scratch.system.jobs import report_progress
from llama_scratch.system.processes import end_group

SOURCE = Path(__file__).with_suffix(".cpp")

_MAX_LIBRARIES = 4  # in the cache; the least recently used are removed
_RETRY_AFTER_S = 24 * 3600  # when a compiler that failed is tried again
_COMPILE_TIMEOUT_S = 300  # also for the compiler of another process
_CHECK_TIMEOUT_S = 10  # for a compiler to say whether it knows C++20
_NO_COMPILER = "they are not made for Windows" if os.name == "nt" else "no C++ compiler was found"
_NO_COMPILER_HINT = "; with one (Debian: apt-get install g++) answers would be faster"

# $LLAMA_SCRATCH_KERNELS → flags; by default the compiler takes all that this CPU has.
INSTRUCTION_SETS = {"avx2": ["-march=x86-64-v3"], "plain": ["-DLLAMA_SCRATCH_PLAIN"]}

_loading = threading.Lock()  # never held while something is compiled
_loaded = False
_failure = ""  # why compiling failed, if it was tried


class _FailedError(Exception):
    """Compiling failed; the message is a clause."""


# --- Interface --------------------------------------------------------------------------------


def ready() -> bool:
    """Whether `torch.ops.llama_scratch` is loaded."""
    return _loaded and _wanted()


def load() -> bool:
    """Load a library from the cache, or one built with the package. False if there is none. Compiles nothing."""
    return _wanted() and (_loaded or any(map(_load, _libraries())))


def possible() -> bool:
    """Whether the kernels are loaded, or `build` may succeed. Starts no compiler."""
    return load() or (_wanted() and not _failed() and bool(_candidates()))


def build() -> bool:
    """Load a library, or compile one: some seconds on one core, at the lowest priority.

    Only one of several processes compiles. The compiler ends with the process, or with the job that calls this; files
    of a killed process are removed by the next one.

    Returns:
        False if compiling failed. It is not tried again for a day.
    """
    global _failure
    if load() or not _wanted() or _failed():
        return ready()
    try:
        try:
            loaded = _build_into_cache(user_folder("cache") / "kernels")
        except OSError:  # no home, or it cannot be written to
            with tempfile.TemporaryDirectory(prefix="llama-scratch-") as folder:
                loaded = _load(compile_into(Path(folder)))
        if not loaded:
            raise _FailedError("what was compiled could not be loaded")
    except (_FailedError, OSError) as failure:
        _failure = str(failure)
        if _candidates() and _program_runs():
            with contextlib.suppress(OSError):
                _reason().write_text(f"{shlex.join(_candidates())}\n{_failure}", "utf-8")
    return ready()


def compiler() -> str | None:
    """The command of a C++ compiler that supports C++20: $CXX, or else the first of c++, g++ and clang++.

    Starts each of them, for at most `_CHECK_TIMEOUT_S`, until one succeeds.
    """
    with contextlib.suppress(_FailedError):
        return _find(_candidates())
    return None


def state() -> str:
    """Describe the kernels, or why there are none, as a clause. Loads nothing and starts no compiler."""
    if not _wanted():
        return "switched off by LLAMA_SCRATCH_KERNELS=0"
    if _loaded:
        return f"compiled for {torch.ops.llama_scratch.machine()}"
    if any(map(_is_whole, _libraries())):
        return "compiled; the first answer loads them"
    if failure := _failed() or ("" if _candidates() else _NO_COMPILER + _NO_COMPILER_HINT):
        return f"none, because {failure}"
    return "not compiled yet; a session does so while you type"


def compile_into(folder: Path) -> Path:
    """Compile a library into a folder, and name it once it is complete. Raises `_FailedError` and OSError."""
    path = folder / f"{secrets.token_hex(4)}.so"  # a random name: a killed process's compiler may still run
    try:
        code, said = _run([*_command(), "-o", str(path)], _COMPILE_TIMEOUT_S, folder)
        if code:
            lines = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()
            raise _FailedError(f"the C++ compiler failed ({sanitize((lines or ['it was killed'])[0], 200)})")
        if not path.exists():
            raise _FailedError("the C++ compiler wrote no library")
        path.chmod(0o600)
        data = path.read_bytes()
        return publish(path, folder / f"{_key()}-{hashlib.sha256(data).hexdigest()}.so")
    finally:
        path.unlink(missing_ok=True)


def _failed() -> str:
    """Why these compilers failed, in this process or another one, within a day; "" if none was tried."""
    with contextlib.suppress(OSError, ValueError):
        if not _failure and time.time() - _reason().stat().st_mtime < _RETRY_AFTER_S:
            commands, _, failure = _reason().read_text("utf-8").partition("\n")
            return sanitize(failure, 300) if commands == shlex.join(_candidates()) else ""
    return _failure


def _reason() -> Path:
    """The file with the reason. Raises OSError if there is no home."""
    return user_folder("cache") / "kernels" / f"{_key()}.failed"


# --- Existing libraries -----------------------------------------------------------------------


def _wanted() -> bool:
    return _setting() != "0"


def _setting() -> str:
    """$LLAMA_SCRATCH_KERNELS: "0" switches the kernels off, a name of `INSTRUCTION_SETS` limits them."""
    return os.environ.get("LLAMA_SCRATCH_KERNELS", "")


def _libraries() -> Iterator[Path]:
    """Libraries for this machine: beside the source, and in the cache."""
    with contextlib.suppress(OSError):  # no home, or no source
        yield from SOURCE.parent.glob(f"{_key()}-*.so")
        yield from (user_folder("cache") / "kernels").glob(f"{_key()}-*.so")


def _load(path: Path) -> bool:
    """Load a complete library; remove one that is damaged, or cannot be loaded in spite of its name."""
    global _loaded
    with _loading:
        # Registering the same operators twice would end the process.
        if _loaded or hasattr(torch.ops.llama_scratch, "linear"):
            _loaded = True
        elif _is_whole(path):
            with contextlib.suppress(OSError):
                os.utime(path)  # used just now
            with contextlib.suppress(OSError, RuntimeError):
                torch.ops.load_library(path)
                _loaded = True
        if not _loaded and path.parent != SOURCE.parent:
            with contextlib.suppress(OSError):
                path.unlink()
    return _loaded


def _is_whole(path: Path) -> bool:
    """Whether no other user could have written a library, and its checksum is the one in its name."""
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDONLY | NO_LINK), "rb") as file:
        status = os.fstat(file.fileno())
        # A library beside the source is as trustworthy as the source.
        ours = path.parent == SOURCE.parent or (is_ours(status) and is_ours(path.parent.stat()))
        return ours and stat.S_ISREG(status.st_mode) and path.stem.endswith(hashlib.sha256(file.read()).hexdigest())
    return False


def _key() -> str:
    """The first part of a library's name: a hash of the source, torch, the CPU and the flags."""
    return _key_of(*_flags())


@functools.cache
def _key_of(*flags: str) -> str:
    sources = [SOURCE, *sorted(SOURCE.parent.glob("cpp/*.h"))]
    inputs = (
        [path.read_bytes() for path in sources],
        torch.__version__,
        torch._C._GLIBCXX_USE_CXX11_ABI,
        _cpu(),
        list(flags),
    )
    return f"kernels-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:32]}"


def _cpu() -> list[str]:
    """The model of the CPU, and its instruction sets."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu"]
        return [subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU implementer", "CPU part", "isa")
    return [platform.machine(), *sorted({line for line in lines if line.startswith(told)})]


def _limit_cache(folder: Path) -> None:
    """Remove what ended processes left unfinished, and of the libraries the least recently used."""
    remove_stale(folder, "*.part")
    trim_folder(folder.glob("*.so"), max_files=_MAX_LIBRARIES - 1)


# --- Compiling --------------------------------------------------------------------------------


def _build_into_cache(folder: Path) -> bool:
    """Compile into the cache, or wait for the process that does, and load. Raises OSError if it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_ours(folder.stat()):
        raise PermissionError
    _limit_cache(folder)
    part, until = folder / f"{_key()}.part", time.monotonic() + _COMPILE_TIMEOUT_S
    while time.monotonic() < until and _program_runs():
        report_progress()
        part.mkdir(0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), locked(part) as alone:  # gone: another process has just finished
            if alone:
                try:
                    if load():  # the other process made it
                        return True
                    library = compile_into(part)
                    return _load(library.replace(folder / library.name))
                finally:
                    shutil.rmtree(part, ignore_errors=True)
        time.sleep(0.05)
    raise _FailedError("another program did not end compiling them")


def _program_runs() -> bool:
    return threading.main_thread().is_alive()


def _candidates() -> list[str]:
    """The commands of C++ compilers on this machine, the best first. Starts none of them."""
    if os.name == "nt":
        return []
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return [name for name in names if _program(name)]


def _program(command: str) -> str | None:
    """The path of a command's program; None if it does not exist."""
    with contextlib.suppress(ValueError):  # quotes that do not match
        words = shlex.split(command)
        return shutil.which(words[0]) if words else None
    return None


@functools.cache
def _knows_cpp20(command: str, path: str) -> str:
    """Why a compiler cannot be used, "" if it can. path: $PATH, by which the command is found."""
    # The oldest that succeed are GCC 10 and Clang 10.
    check = [*shlex.split(command), "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        code, _ = _run(check, _CHECK_TIMEOUT_S)
    except _FailedError as failure:
        return f"{sanitize(command, 200)} does not work ({failure})"
    return f"{sanitize(command, 200)} knows no C++20" if code else ""


def _find(commands: list[str]) -> str:
    """The first compiler that supports C++20. Raises `_FailedError` with the reason of the last one."""
    why = _NO_COMPILER
    for command in commands:
        if not (why := _knows_cpp20(command, os.environ.get("PATH", ""))):
            return command
    raise _FailedError(why + _NO_COMPILER_HINT)


def _flags() -> list[str]:
    """Compiler flags. Contraction is off: a·b + c is rounded twice on every machine."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    instructions = INSTRUCTION_SETS.get(_setting(), [native])
    flags = ["-std=c++20", "-O3", *instructions, "-ffp-contract=off", "-shared", "-fPIC", "-w"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    if sys.platform == "darwin":
        return [*flags, "-undefined", "dynamic_lookup", "-Xpreprocessor", "-fopenmp"]
    return [*flags, "-fopenmp"] if "backend: OpenMP" in torch.__config__.parallel_info() else flags


def _command() -> list[str]:
    """The command, without the path of the library."""
    command = _find(_candidates())
    # As in `torch.utils.cpp_extension`, which is not imported because it needs setuptools.
    home = Path(torch.__file__).parent
    quietly = ["nice", "-n", "19"] if shutil.which("nice") else []
    includes = [f"-I{home / path}" for path in ("include", "include/torch/csrc/api/include")]
    libraries = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    return [*quietly, *shlex.split(command), *_flags(), *includes, str(SOURCE), *libraries]


def _run(command: list[str], seconds: float, folder: Path | None = None) -> tuple[int, str]:
    """Run a compiler. It ends with all that it started, at the latest when the job or the program ends.

    Args:
        command: The program and its arguments.
        seconds: The time after which it is ended.
        folder: A folder for its temporary files.

    Returns:
        Its exit code and what it wrote to stderr.

    Raises:
        _FailedError: If it cannot be started or takes too long.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"LC_ALL": "C"} | ({"TMPDIR": str(folder)} if folder else {}),
            process_group=0,  # Ctrl-C is meant for an answer, not for this
        )
    except OSError as error:
        raise _FailedError(f"the C++ compiler could not be started ({sanitize(str(error))})") from None
    until = time.monotonic() + seconds
    try:
        while True:
            report_progress()
            try:
                _, said = process.communicate(timeout=0.1)
                return process.returncode, said
            except subprocess.TimeoutExpired:
                if process.poll() is not None:
                    end_group(process)  # what it left running has stderr open
                elif not _program_runs() or time.monotonic() > until:
                    raise _FailedError("the C++ compiler took too long") from None
    finally:
        end_group(process)
