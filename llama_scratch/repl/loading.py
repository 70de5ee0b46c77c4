"""Background loading: a thread loads the model while the user is already typing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from llama_scratch.system.progress import Progress, silent

if TYPE_CHECKING:
    from llama_scratch.llama import Llama


class Loading:
    """A model that is loaded, or that a background thread is loading.

    Args:
        name: The model's name or path, shown until the model is loaded.
        load: Loads the model and reports its progress.

    Attributes:
        stage: The current stage, the work done and the total, as passed to a `Progress` callback.
        error: The exception that loading raised, if any.
    """

    def __init__(self, name: str, load: Callable[[Progress], Llama]) -> None:
        self.stage = ("starting torch", 0, 0)
        self.error: BaseException | None = None
        self._name = name
        self._load = load
        self._llama: Llama | None = None
        # A daemon thread, so exiting does not wait for it.
        self._thread = Thread(target=self._run, name="loading", daemon=True)

    @classmethod
    def ended_with(cls, llama: Llama) -> Loading:
        """Wrap a model that is already loaded."""
        loading = cls(llama.info.name, lambda _: llama)
        loading._llama = llama
        return loading

    def start(self) -> None:
        """Start loading, unless it has started."""
        if not self.ended and self._thread.ident is None:
            self._thread.start()

    def wait(self, progress: Progress = silent) -> Llama:
        """Wait for the model and return it.

        Re-raises an exception from loading. Ctrl-C cancels only the wait.
        """
        self.start()
        while self._llama is None:
            if self.error is not None:
                raise self.error
            progress(*self.stage)
            time.sleep(0.02)  # polling, because an interrupt could leave a lock held
        return self._llama

    @property
    def ended(self) -> bool:
        """Whether `wait` returns or raises immediately."""
        return self._llama is not None or self.error is not None

    @property
    def background(self) -> tuple[str, int, int] | None:
        """The stage of the background work, the work done and the total.

        None if no work is running.
        """
        if not self.ended:
            return self.stage
        return None if self.error else self.wait().preparing

    @property
    def name(self) -> str:
        """The model's name. Until it is loaded, the name or path that was given."""
        return self._name if self._llama is None else self._llama.info.name

    def _run(self) -> None:
        try:
            with _gil_shared():
                _map_torch()
                self._llama = self._load(self._report)
        except BaseException as error:  # noqa: BLE001 - re-raised by `wait`
            self.error = error

    def _report(self, stage: str, done: int, total: int) -> None:
        self.stage = (stage, done, total)


@contextlib.contextmanager
def _gil_shared() -> Iterator[None]:
    """Switch threads ten times as often, to echo typing without delay."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 10)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _map_torch() -> None:
    """Load torch's shared libraries before importing torch.

    This keeps the prompt responsive: ctypes releases the GIL while it loads a library; an import does not. The order
    and the flags are the same as in torch. If a library is not found, the import of torch loads it.
    """
    torch = find_spec("torch")
    if torch is None or torch.origin is None or not sys.platform.startswith("linux"):
        return
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    for library, mode in (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch_cpu.so", os.RTLD_LOCAL)):
        dlopen(os.fsencode(Path(torch.origin).parent / "lib" / library), os.RTLD_NOW | mode)
