"""Background jobs: long-running work while answers are given."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from llama_scratch.errors import LlamaScratchError
from llama_scratch.system.progress import Progress, silent

Job = tuple[Callable[[], object], int]
"""A function, and its share of the work."""


_within = threading.local()


class JobCancelledError(Exception):
    """Ends a job that nobody waits for any more."""


def report_progress(stage: str = "", done: int = 0, total: int = 1) -> None:
    """Report a job's progress. Raises `JobCancelledError` if the job should stop."""
    background: BackgroundJobs | None = getattr(_within, "background", None)
    if background is not None:
        background.report_progress(stage, done, total)


class BackgroundJobs:
    """Jobs on a few threads, between `start` and `close`: of tenths of a second each, or such as `report_progress`.

    The first that fails ends the others, and `wait` raises its error. The threads end by themselves when the
    program does. `after` is called after each job. `started`: whether it was begun.
    """

    def __init__(self, stage: str, jobs: Sequence[Job], threads: int = 1, after: Callable[[], None] | None = None):
        self.stage = stage
        self.error: BaseException | None = None
        self._jobs = deque(jobs)
        self._after = after
        self._total = sum(size for _, size in jobs)
        self._done = 0
        # Only the threads take it: an interrupt of the main thread could leave it taken.
        self._lock = threading.Lock()
        self._running = 0
        self._reported: tuple[str, int, int] | None = None
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=stage) for _ in range(threads)]
        self.started = False

    def start(self) -> None:
        """Begin, if that was not done yet; comes back at once."""
        if self.started or self._closed or not self._jobs:
            return
        self.started = True
        self._running = len(self._threads)
        for thread in self._threads:
            thread.start()

    @property
    def done(self) -> bool:
        """Whether all jobs were done, but for those of size 0."""
        return self._done == self._total

    @property
    def running(self) -> bool:
        """Whether a job is being done or will be."""
        return self._running > 0

    @property
    def progress(self) -> tuple[str, int, int]:
        """What is being done, how much of it is done and how much there is."""
        return self._reported or (self.stage, self._done, self._total)

    def report_progress(self, stage: str, done: int, total: int) -> None:
        """See the function; `stage`: "" where there is nothing to say."""
        if self._closed or not _program_runs():
            raise JobCancelledError
        if stage:
            self._reported = stage, done, total

    def wait(self, progress: Progress = silent) -> None:
        """Start if need be and come back when all is done; raises the error of a job that failed."""
        self.start()
        while self._running and not self.error:
            progress(*self.progress)
            time.sleep(0.02)  # which holds no lock that an interrupt could leave held
        if self.error:
            raise self.error

    def close(self) -> None:
        """Begin no further job, and come back when those that run have ended."""
        self._closed = True
        self._jobs.clear()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _run(self) -> None:
        _within.background = self
        while job := self._next():
            function, size = job
            try:
                function()
                if self._after:
                    self._after()
            except JobCancelledError:
                break
            except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
                if isinstance(error, LlamaScratchError):
                    error.with_traceback(None)  # which holds what the refusal interrupted
                self.error = self.error or error
                self._jobs.clear()
                break
            with self._lock:
                self._done += size
        with self._lock:
            self._running -= 1

    def _next(self) -> Job | None:
        # At the program's end Python waits for its threads, so they must not go on to the last job.
        try:
            return self._jobs.popleft() if _program_runs() else None
        except IndexError:
            return None


def _program_runs() -> bool:
    return threading.main_thread().is_alive()
