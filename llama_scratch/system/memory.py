"""What this machine's memory can take."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llama_scratch.errors import OutOfMemoryError

# Version 1 of control groups writes the largest number of whole pages where there is no limit.
_UNLIMITED = 1 << 62
# What torch, numpy and their threads take when they are imported, besides their libraries.
_START_BYTES = 300_000_000
_NO_MEMORY = re.compile(
    "allocate memory|out of memory|failed to map segment|cannot allocate|can't start new thread|bad_alloc",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class MemoryLimit:
    """free: bytes that this program can still take. limit: the limit that says so, "" where it is the machine."""

    free: int
    limit: str = ""

    def __str__(self) -> str:
        """The end of a sentence: what is free, and what to do."""
        under, act = (f" under {self.limit}", "raise it") if self.limit else ("", "close other programs")
        return f"{self.free / 1e9:.1f} GB are free{under}; {act}, or choose a smaller model, context or precision."


def available_memory() -> int:
    """Bytes of memory that this program can still take."""
    return memory_limit().free


def memory_limit() -> MemoryLimit:
    """What this program can still take: the least that the machine and the limits set on the program leave it."""
    import psutil

    return min(
        [MemoryLimit(int(psutil.virtual_memory().available)), *_resource_limits(), *_cgroups()], key=lambda r: r.free
    )


def _resource_limits() -> Iterator[MemoryLimit]:
    """What `ulimit -v` and `ulimit -d` leave; mapped weights count in the first, and are in it once they are mapped."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    taken = dict(re.findall(r"^(VmSize|VmData):\s+(\d+) kB", _read(Path("/proc/self/status")), re.MULTILINE))
    for name, kind, field in (
        ("RLIMIT_AS", resource.RLIMIT_AS, "VmSize"),
        ("RLIMIT_DATA", resource.RLIMIT_DATA, "VmData"),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY and field in taken:
            yield MemoryLimit(max(0, limit - 1024 * int(taken[field])), f"a limit of {limit / 1e9:.1f} GB ({name})")


def _cgroups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[MemoryLimit]:
    """What each control group leaves that this program is in, with all above it.

    Pages of files that were not used lately are given up before the limit strikes, so they count as free.
    """
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        limits: tuple[str, ...]
        if controllers == "":
            base, limits, usage, cache = root, ("memory.max", "memory.high"), "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limits = root / "memory", ("memory.limit_in_bytes",)
            usage, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            used = _read(folder / usage).strip()
            given_up = re.search(rf"^{cache} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            for name in limits:
                limit = _read(folder / name).strip()
                if limit.isdecimal() and used.isdecimal() and int(limit) < _UNLIMITED:
                    taken = int(used) - (int(given_up[1]) if given_up else 0)
                    yield MemoryLimit(max(0, int(limit) - taken), f"a limit of {int(limit) / 1e9:.1f} GB ({name})")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # another system, or a file that only other versions have
        return ""


def resident() -> int:
    """Bytes of this program that are in memory, pages of mapped files among them."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def require_memory(needed: int | dict[str, int], what: str) -> None:
    """Raise `OutOfMemoryError` where more bytes are needed than this machine has free.

    needed: bytes, or bytes by what they are for, which the error then lists.
    """
    parts = needed if isinstance(needed, dict) else {}
    total = sum(parts.values()) if isinstance(needed, dict) else needed
    left = memory_limit()
    if total > left.free:
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
        raise OutOfMemoryError(
            f"{what} needs {total / 1e9:.1f} GB of memory{f' ({listed})' if listed else ''} and {left}"
        )


def require_start() -> None:
    """Raise `OutOfMemoryError` where a limit leaves too little for torch to be imported.

    Where memory ends within that, the loader, OpenBLAS or C++ may end the program, each with words of its own.
    """
    if "torch" in sys.modules:
        return
    for left in _resource_limits():
        needed = _START_BYTES + (_size_of_torch() if "RLIMIT_AS" in left.limit else 0)
        if needed > left.free:
            raise OutOfMemoryError(f"Starting torch needs {needed / 1e9:.1f} GB of memory and {left}")


def _size_of_torch() -> int:
    """Bytes of its libraries, which are mapped as a whole."""
    spec = importlib.util.find_spec("torch")
    folders = spec.submodule_search_locations if spec else None
    return sum(file.stat().st_size for folder in folders or [] for file in Path(folder, "lib").glob("*.so*"))


def is_memory_error(error: BaseException) -> bool:
    """Whether memory ran out: as Python says it, torch, the loader of a library, or the system for a map or thread."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | OSError | ImportError) and bool(_NO_MEMORY.search(str(error)))


def refusal() -> str:
    """The sentence where memory ran out before it was known how much is needed."""
    return f"This program needs more memory than there is: {memory_limit()}"


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn an allocation that failed, on the CPU or a GPU, into an `OutOfMemoryError` about `what`."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if is_memory_error(error):
            raise does_not_fit(what, error) from error
        raise


def does_not_fit(what: str, error: BaseException) -> OutOfMemoryError:
    """The refusal after an allocation failed: how much was asked for, where the error says it, and what is free."""
    size = re.search(r"(\d+) bytes", str(error))
    asked = f"{int(size[1]) / 1e9:.1f} GB more were asked for and " if size else ""
    # A GPU's memory is another one.
    left = "choose a smaller model, context or precision." if "CUDA" in str(error) else f"{asked}{memory_limit()}"
    return OutOfMemoryError(f"{what} does not fit into this machine's memory; {left}")


def trim_heap() -> None:
    """Return to the system what was freed: glibc keeps it for each thread, some hundred MB after packing."""
    if sys.platform.startswith("linux"):
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
