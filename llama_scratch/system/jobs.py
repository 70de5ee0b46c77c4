"""Background jobs: long-running work in threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from llama_scratch.errors import LlamaScratchError
from llama_scratch.system.progress import Progress, silent

Job = tuple[Callable[[], object], int]
"""A function, and the amount of work that it does."""


_within = threading.local()


class JobCancelledError(Exception):
    """Raised inside a job that should stop."""


def report_progress(stage: str = "", done: int = 0, total: int = 1) -> None:
    """Report a job's progress. Does nothing outside of a job.

    Args:
        stage: The name of the stage, or "" to only check for cancellation.
        done: The work done.
        total: The total work.

    Raises:
        JobCancelledError: If the job should stop.
    """
    background: BackgroundJobs | None = getattr(_within, "background", None)
    if background is not None:
        background.report_progress(stage, done, total)


class BackgroundJobs:
    """Runs jobs on a few threads, between `start` and `close`.

    A job should take at most a few tenths of a second, or call `report_progress` regularly, so that it can be
    cancelled. If a job fails, the remaining jobs are dropped, and `wait` raises its error. The threads stop when the
    main thread ends.

    Args:
        stage: The name of the stage for `progress`.
        jobs: The jobs, in order.
        threads: Number of threads.
        after: Called after each job.
    """

    def __init__(self, stage: str, jobs: Sequence[Job], threads: int = 1, after: Callable[[], None] | None = None):
        self.stage = stage
        self.error: BaseException | None = None
        self._jobs = deque(jobs)
        self._after = after
        self._total = sum(size for _, size in jobs)
        self._done = 0
        # The main thread never acquires this lock, because Ctrl-C could interrupt it before it releases the lock.
        self._lock = threading.Lock()
        self._running = 0
        self._reported: tuple[str, int, int] | None = None
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=stage) for _ in range(threads)]
        self.started = False

    def start(self) -> None:
        """Start the threads, unless they were started before. Returns at once."""
        if self.started or self._closed or not self._jobs:
            return
        self.started = True
        self._running = len(self._threads)
        for thread in self._threads:
            thread.start()

    @property
    def done(self) -> bool:
        """Whether all jobs are done. Jobs of size 0 do not count."""
        return self._done == self._total

    @property
    def running(self) -> bool:
        """Whether a thread is still running jobs."""
        return self._running > 0

    @property
    def progress(self) -> tuple[str, int, int]:
        """The stage, the work done and the total work."""
        return self._reported or (self.stage, self._done, self._total)

    def report_progress(self, stage: str, done: int, total: int) -> None:
        """Report progress, like the function `report_progress`.

        Args:
            stage: The name of the stage, or "" to only check for cancellation.
            done: The work done.
            total: The total work.
        """
        if self._closed or not _program_runs():
            raise JobCancelledError
        if stage:
            self._reported = stage, done, total

    def wait(self, progress: Progress = silent) -> None:
        """Start the jobs if necessary and wait until they are done.

        If a job has failed, raises its error.
        """
        self.start()
        while self._running and not self.error:
            progress(*self.progress)
            time.sleep(0.02)  # holds no lock, so an interrupt is safe here
        if self.error:
            raise self.error

    def close(self) -> None:
        """Drop the jobs that have not started, and wait until the running ones end."""
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
            except BaseException as error:  # noqa: BLE001 - raised again by `wait`
                if isinstance(error, LlamaScratchError):
                    error.with_traceback(None)  # a traceback keeps local variables alive
                self.error = self.error or error
                self._jobs.clear()
                break
            with self._lock:
                self._done += size
        with self._lock:
            self._running -= 1

    def _next(self) -> Job | None:
        # At exit, Python waits for its threads, so they must not start the remaining jobs.
        try:
            return self._jobs.popleft() if _program_runs() else None
        except IndexError:
            return None


def _program_runs() -> bool:
    return threading.main_thread().is_alive()
