"""Compile `kernels.cpp` once per machine, and load the library from the cache.

Nothing is compiled or loaded until `build` or `load` is called. Without a C++ compiler, torch's operators are used.
A library's name contains a hash of its inputs (source, torch, CPU, flags) and its own checksum, because a damaged
library could crash the process. The compiler is not part of the hash: libraries from all compilers give the same
results, and a library remains usable if the compiler is removed.

    kernels-<key>-<sha256>.so    a complete library that no other user can write
    kernels-<key>.failed         the reason for a failed compilation
    kernels-<key>.part/          working folder of the one process that compiles while others wait
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
_RETRY_AFTER_S = 24 * 3600  # after a failed compilation
_COMPILE_TIMEOUT_S = 300  # also the time to wait for another process
_CHECK_TIMEOUT_S = 10  # for checking whether a compiler supports C++20
_NO_COMPILER = "they are not available on Windows" if os.name == "nt" else "no C++ compiler was found"
_NO_COMPILER_HINT = "; with one (Debian: apt-get install g++) answers would be faster"

# $LLAMA_SCRATCH_KERNELS → flags. By default, the compiler uses all instructions of this CPU.
INSTRUCTION_SETS = {"avx2": ["-march=x86-64-v3"], "plain": ["-DLLAMA_SCRATCH_PLAIN"]}

_loading = threading.Lock()  # not held during compilation
_loaded = False
_failure = ""  # the reason for a failed compilation in this process


class _FailedError(Exception):
    """Compilation failed. The message is a clause."""


# --- Interface --------------------------------------------------------------------------------


def ready() -> bool:
    """Whether `torch.ops.llama_scratch` is loaded."""
    return _loaded and _wanted()


def load() -> bool:
    """Load a library from the cache or the package, without compiling one.

    Returns:
        Whether a library is loaded.
    """
    return _wanted() and (_loaded or any(map(_load, _libraries())))


def possible() -> bool:
    """Whether the kernels are loaded, or `build` may succeed. Does not run a compiler."""
    return load() or (_wanted() and not _failed() and bool(_candidates()))


def build() -> bool:
    """Load a library, or compile one at the lowest priority.

    Compilation takes about 20 seconds on one core. If several processes call this, only one compiles. The compiler ends
    with the process or the job that called this function. If a process was killed, the next one removes its files.

    Returns:
        Whether a library is loaded. A failed compilation is retried after a day.
    """
    global _failure
    if load() or not _wanted() or _failed():
        return ready()
    try:
        try:
            loaded = _build_into_cache(user_folder("cache") / "kernels")
        except OSError:  # no home directory, or it is not writable
            with tempfile.TemporaryDirectory(prefix="llama-scratch-") as folder:
                loaded = _load(compile_into(Path(folder)))
        if not loaded:
            raise _FailedError("the compiled library could not be loaded")
    except (_FailedError, OSError) as failure:
        _failure = str(failure)
        if _candidates() and _program_runs():
            with contextlib.suppress(OSError):
                _reason().write_text(f"{shlex.join(_candidates())}\n{_failure}", "utf-8")
    return ready()


def compiler() -> str | None:
    """Return the command of a C++20 compiler: $CXX, c++, g++ or clang++.

    Runs each of them for at most `_CHECK_TIMEOUT_S` until one succeeds.
    """
    with contextlib.suppress(_FailedError):
        return _find(_candidates())
    return None


def state() -> str:
    """Describe the state of the kernels, as a clause.

    Does not load a library or run a compiler.
    """
    if not _wanted():
        return "switched off by LLAMA_SCRATCH_KERNELS=0"
    if _loaded:
        return f"compiled for {torch.ops.llama_scratch.machine()}"
    if any(map(_is_whole, _libraries())):
        return "compiled; the first answer loads them"
    if failure := _failed() or ("" if _candidates() else _NO_COMPILER + _NO_COMPILER_HINT):
        return f"none, because {failure}"
    return "not compiled yet; a session compiles them while you type"


def compile_into(folder: Path) -> Path:
    """Compile a library into a folder, and rename it after it is complete.

    Raises:
        _FailedError: If the compilation fails.
        OSError: If the folder is not writable.
    """
    path = folder / f"{secrets.token_hex(4)}.so"  # random: the compiler of a killed process may still be running
    try:
        code, output = _run([*_command(), "-o", str(path)], _COMPILE_TIMEOUT_S, folder)
        if code:
            lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()
            raise _FailedError(f"the C++ compiler failed ({sanitize((lines or ['it was killed'])[0], 200)})")
        if not path.exists():
            raise _FailedError("the C++ compiler wrote no library")
        path.chmod(0o600)
        data = path.read_bytes()
        return publish(path, folder / f"{_key()}-{hashlib.sha256(data).hexdigest()}.so")
    finally:
        path.unlink(missing_ok=True)


def _failed() -> str:
    """Return the reason why any process failed to compile within the last day, or ""."""
    with contextlib.suppress(OSError, ValueError):
        if not _failure and time.time() - _reason().stat().st_mtime < _RETRY_AFTER_S:
            commands, _, failure = _reason().read_text("utf-8").partition("\n")
            return sanitize(failure, 300) if commands == shlex.join(_candidates()) else ""
    return _failure


def _reason() -> Path:
    """Return the path of the .failed file. Raises OSError without a home directory."""
    return user_folder("cache") / "kernels" / f"{_key()}.failed"


# --- Existing libraries -----------------------------------------------------------------------


def _wanted() -> bool:
    return _setting() != "0"


def _setting() -> str:
    """Return $LLAMA_SCRATCH_KERNELS: "0" disables kernels, a name in `INSTRUCTION_SETS` limits them."""
    return os.environ.get("LLAMA_SCRATCH_KERNELS", "")


def _libraries() -> Iterator[Path]:
    """Yield the libraries for this machine: in the package, then in the cache."""
    with contextlib.suppress(OSError):  # no home directory, or no source
        yield from SOURCE.parent.glob(f"{_key()}-*.so")
        yield from (user_folder("cache") / "kernels").glob(f"{_key()}-*.so")


def _load(path: Path) -> bool:
    """Load a library. Remove it from the cache if it is damaged or cannot be loaded."""
    global _loaded
    with _loading:
        # Registering the same operators twice aborts the process.
        if _loaded or hasattr(torch.ops.llama_scratch, "linear"):
            _loaded = True
        elif _is_whole(path):
            with contextlib.suppress(OSError):
                os.utime(path)  # mark as used
            with contextlib.suppress(OSError, RuntimeError):
                torch.ops.load_library(path)
                _loaded = True
        if not _loaded and path.parent != SOURCE.parent:
            with contextlib.suppress(OSError):
                path.unlink()
    return _loaded


def _is_whole(path: Path) -> bool:
    """Whether a library matches the checksum in its name, and no other user could have written it."""
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDONLY | NO_LINK), "rb") as file:
        status = os.fstat(file.fileno())
        # A library in the package is as trustworthy as the source.
        ours = path.parent == SOURCE.parent or (is_ours(status) and is_ours(path.parent.stat()))
        return ours and stat.S_ISREG(status.st_mode) and path.stem.endswith(hashlib.sha256(file.read()).hexdigest())
    return False


def _key() -> str:
    """Return the first part of a library's name: a hash of source, torch, CPU and flags."""
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
    """Return the CPU's model and instruction sets."""
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
    """Remove stale .part folders and the least recently used libraries."""
    remove_stale(folder, "*.part")
    trim_folder(folder.glob("*.so"), max_files=_MAX_LIBRARIES - 1)


# --- Compiling --------------------------------------------------------------------------------


def _build_into_cache(folder: Path) -> bool:
    """Compile a library into the cache, or wait for the process that does, and load it.

    Raises OSError if the cache is not writable.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_ours(folder.stat()):
        raise PermissionError
    _limit_cache(folder)
    part, until = folder / f"{_key()}.part", time.monotonic() + _COMPILE_TIMEOUT_S
    while time.monotonic() < until and _program_runs():
        report_progress()
        part.mkdir(0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), locked(part) as alone:  # another process has just finished
            if alone:
                try:
                    if load():  # another process compiled it
                        return True
                    library = compile_into(part)
                    return _load(library.replace(folder / library.name))
                finally:
                    shutil.rmtree(part, ignore_errors=True)
        time.sleep(0.05)
    raise _FailedError("another process took too long to compile them")


def _program_runs() -> bool:
    return threading.main_thread().is_alive()


def _candidates() -> list[str]:
    """Return the commands of installed C++ compilers, in order of preference. Does not run them."""
    if os.name == "nt":
        return []
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return [name for name in names if _program(name)]


def _program(command: str) -> str | None:
    """Return the path of a command's program, or None if it does not exist."""
    with contextlib.suppress(ValueError):  # unbalanced quotes
        words = shlex.split(command)
        return shutil.which(words[0]) if words else None
    return None


@functools.cache
def _knows_cpp20(command: str, path: str) -> str:
    """Return the reason why a compiler cannot be used, or "". path: $PATH, for the cache of this function."""
    # GCC 10 and Clang 10 are the oldest that succeed.
    check = [*shlex.split(command), "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        code, _ = _run(check, _CHECK_TIMEOUT_S)
    except _FailedError as failure:
        return f"{sanitize(command, 200)} does not work ({failure})"
    return f"{sanitize(command, 200)} does not support C++20" if code else ""


def _find(commands: list[str]) -> str:
    """Return the first compiler that supports C++20. Raises `_FailedError` with the reason for the last one."""
    why = _NO_COMPILER
    for command in commands:
        if not (why := _knows_cpp20(command, os.environ.get("PATH", ""))):
            return command
    raise _FailedError(why + _NO_COMPILER_HINT)


def _flags() -> list[str]:
    """Return the compiler flags. Contraction is off, so every machine rounds a·b + c twice."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    instructions = INSTRUCTION_SETS.get(_setting(), [native])
    flags = ["-std=c++20", "-O3", *instructions, "-ffp-contract=off", "-shared", "-fPIC", "-w"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    if sys.platform == "darwin":
        return [*flags, "-undefined", "dynamic_lookup", "-Xpreprocessor", "-fopenmp"]
    return [*flags, "-fopenmp"] if "backend: OpenMP" in torch.__config__.parallel_info() else flags


def _command() -> list[str]:
    """Return the compiler's command, without the path of the output."""
    command = _find(_candidates())
    # As in `torch.utils.cpp_extension`, which requires setuptools.
    home = Path(torch.__file__).parent
    quietly = ["nice", "-n", "19"] if shutil.which("nice") else []
    includes = [f"-I{home / path}" for path in ("include", "include/torch/csrc/api/include")]
    libraries = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    return [*quietly, *shlex.split(command), *_flags(), *includes, str(SOURCE), *libraries]


def _run(command: list[str], seconds: float, folder: Path | None = None) -> tuple[int, str]:
    """Run a compiler, and end it with its child processes if the job or the program ends.

    Args:
        command: The program and its arguments.
        seconds: Timeout.
        folder: Folder for temporary files.

    Returns:
        The exit code and the output on stderr.

    Raises:
        _FailedError: If the compiler cannot be started or takes too long.
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
            process_group=0,  # so that Ctrl-C does not end it
        )
    except OSError as error:
        raise _FailedError(f"the C++ compiler could not be started ({sanitize(str(error))})") from None
    until = time.monotonic() + seconds
    try:
        while True:
            report_progress()
            try:
                _, output = process.communicate(timeout=0.1)
                return process.returncode, output
            except subprocess.TimeoutExpired:
                if process.poll() is not None:
                    end_group(process)  # child processes that it left still have stderr open
                elif not _program_runs() or time.monotonic() > until:
                    raise _FailedError("the C++ compiler took too long") from None
    finally:
        end_group(process)
