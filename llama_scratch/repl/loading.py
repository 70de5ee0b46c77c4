"""The model on its way: a thread loads it while the person already types."""

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
    """A model that is loaded by a thread of its own, or is there already.

    stage: what is being done, how much of it is done and how much there is, as a `Progress` is told.
    error: what loading it raised.
    """

    def __init__(self, name: str, load: Callable[[Progress], Llama]) -> None:
        self.stage = ("starting torch", 0, 0)
        self.error: BaseException | None = None
        self._name = name
        self._load = load
        self._llama: Llama | None = None
        # A daemon, so that leaving never waits for it.
        self._thread = Thread(target=self._run, name="loading", daemon=True)

    @classmethod
    def ended_with(cls, llama: Llama) -> Loading:
        """The loading of a model that is there."""
        loading = cls(llama.info.name, lambda _: llama)
        loading._llama = llama
        return loading

    def start(self) -> None:
        """Begin, unless it has begun."""
        if not self.ended and self._thread.ident is None:
            self._thread.start()

    def wait(self, progress: Progress = silent) -> Llama:
        """The model, once it is there; raises what loading it raised. An interrupt ends the waiting alone."""
        self.start()
        while self._llama is None:
            if self.error is not None:
                raise self.error
            progress(*self.stage)
            time.sleep(0.02)  # which holds no lock that an interrupt could leave held
        return self._llama

    @property
    def ended(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        return self._llama is not None or self.error is not None

    @property
    def background(self) -> tuple[str, int, int] | None:
        """The stage of the work in the background, with how much of it is done and how much there is."""
        if not self.ended:
            return self.stage
        return None if self.error else self.wait().preparing

    @property
    def name(self) -> str:
        """What the model is called; while it is not there, by its path."""
        return self._name if self._llama is None else self._llama.info.name

    def _run(self) -> None:
        try:
            with _gil_shared():
                _map_torch()
                self._llama = self._load(self._report)
        except BaseException as error:  # noqa: BLE001 - raised again by `wait`
            self.error = error

    def _report(self, stage: str, done: int, total: int) -> None:
        self.stage = (stage, done, total)


@contextlib.contextmanager
def _gil_shared() -> Iterator[None]:
    """Let a thread that works give way ten times as often, so that typing is echoed at once."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 10)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _map_torch() -> None:
    """Map torch's libraries before it is imported: ctypes lets go of the GIL, an import holds it all the while.

    In the order and ways of torch itself; where they are not found, the import does it all.
    """
    torch = find_spec("torch")
    if torch is None or torch.origin is None or not sys.platform.startswith("linux"):
        return
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    for library, mode in (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch_cpu.so", os.RTLD_LOCAL)):
        dlopen(os.fsencode(Path(torch.origin).parent / "lib" / library), os.RTLD_NOW | mode)
