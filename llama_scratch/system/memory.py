"""Available memory, limits on it, and out-of-memory errors."""

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

# cgroups v1 without a limit report the largest multiple of the page size, which is above this number.
_UNLIMITED = 1 << 62
# Memory that importing torch and numpy takes, with their threads but without their libraries.
_START_BYTES = 300_000_000
_NO_MEMORY = re.compile(
    "allocate memory|out of memory|failed to map segment|cannot allocate|can't start new thread|bad_alloc",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that this process can still allocate.

    Attributes:
        free: Bytes.
        limit: The limit, such as "a limit of 1.0 GB (RLIMIT_AS)". Empty for the machine's memory.
    """

    free: int
    limit: str = ""

    def __str__(self) -> str:
        """Return the end of an error message: the free memory, and advice."""
        under, act = (f" under {self.limit}", "Raise it") if self.limit else ("", "Close other programs")
        return f"{self.free / 1e9:.1f} GB are free{under}. {act}, or choose a smaller model, context or precision."


def available_memory() -> int:
    """Bytes of memory that this process can still allocate."""
    return memory_limit().free


def memory_limit() -> MemoryLimit:
    """Return the tightest limit: free memory, a resource limit or a control group."""
    import psutil

    return min(
        [MemoryLimit(int(psutil.virtual_memory().available)), *_resource_limits(), *_cgroups()], key=lambda r: r.free
    )


def _resource_limits() -> Iterator[MemoryLimit]:
    """Yield the memory left under RLIMIT_AS and RLIMIT_DATA.

    Mapped files count against RLIMIT_AS as soon as they are mapped, but not against RLIMIT_DATA.
    """
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
    """Yield the memory left in this process's control groups and all their parents.

    Inactive pages of cached files count as free, because the kernel reclaims them before the limit takes effect.
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
            reclaimable = re.search(rf"^{cache} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            for name in limits:
                limit = _read(folder / name).strip()
                if limit.isdecimal() and used.isdecimal() and int(limit) < _UNLIMITED:
                    taken = int(used) - (int(reclaimable[1]) if reclaimable else 0)
                    yield MemoryLimit(max(0, int(limit) - taken), f"a limit of {int(limit) / 1e9:.1f} GB ({name})")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not on this operating system or kernel version
        return ""


def resident() -> int:
    """Return the resident memory of this process in bytes, including mapped pages."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def require_memory(needed: int | dict[str, int], what: str) -> None:
    """Check that there is enough memory before allocating it.

    Args:
        needed: Bytes, or purpose → bytes. The error lists the purposes.
        what: The subject of the error, such as "Calibrating int4".

    Raises:
        OutOfMemoryError: If more bytes are needed than are free.
    """
    parts = needed if isinstance(needed, dict) else {}
    total = sum(parts.values()) if isinstance(needed, dict) else needed
    left = memory_limit()
    if total > left.free:
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
        raise OutOfMemoryError(
            f"{what} needs {total / 1e9:.1f} GB of memory{f' ({listed})' if listed else ''}, but only {left}"
        )


def require_start() -> None:
    """Raise `OutOfMemoryError` if a limit leaves too little memory to import torch.

    Otherwise, the loader, OpenBLAS or C++ could abort the process during the import, with unclear messages.
    """
    if "torch" in sys.modules:
        return
    for left in _resource_limits():
        needed = _START_BYTES + (_size_of_torch() if "RLIMIT_AS" in left.limit else 0)
        if needed > left.free:
            raise OutOfMemoryError(f"Importing torch needs {needed / 1e9:.1f} GB of memory, but only {left}")


def _size_of_torch() -> int:
    """Return the size of torch's libraries in bytes. Importing torch maps all of them."""
    spec = importlib.util.find_spec("torch")
    folders = spec.submodule_search_locations if spec else None
    return sum(file.stat().st_size for folder in folders or [] for file in Path(folder, "lib").glob("*.so*"))


def is_memory_error(error: BaseException) -> bool:
    """Whether an error means out of memory.

    Recognizes errors of Python, torch, the dynamic loader and the system (mappings and threads).
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | OSError | ImportError) and bool(_NO_MEMORY.search(str(error)))


def refusal() -> str:
    """Return the message for running out of memory if the needed size is not known."""
    return f"Out of memory: {memory_limit()}"


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn a failed allocation on CPU or GPU into an `OutOfMemoryError` about `what`."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if is_memory_error(error):
            raise does_not_fit(what, error) from error
        raise


def does_not_fit(what: str, error: BaseException) -> OutOfMemoryError:
    """Create the error for a failed allocation.

    Args:
        what: The subject of the message.
        error: The failed allocation. If its message contains the requested size, the new message does, too.
    """
    size = re.search(r"(\d+) bytes", str(error))
    asked = f"{int(size[1]) / 1e9:.1f} GB more were requested, and " if size else ""
    # `memory_limit` is about the CPU's memory, not a GPU's.
    left = ". Choose a smaller model, context or precision." if "CUDA" in str(error) else f": {asked}{memory_limit()}"
    return OutOfMemoryError(f"{what} does not fit into this machine's memory{left}")


def trim_heap() -> None:
    """Return freed memory to the system.

    glibc keeps freed memory per thread: a few hundred MB after packing.
    """
    if sys.platform.startswith("linux"):
        with suppress(AttributeError, OSError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)
