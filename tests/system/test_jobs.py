"""Background jobs: in order, quickly closed, and never delaying the end of the program."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from llama_scratch.system.jobs import BackgroundJobs, Job, report_progress
from tests.helpers.processes import SOON, until


def void(_: object) -> None:
    """Discard a result."""


def raising(error: BaseException) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


def test_nothing_runs_before_the_start() -> None:
    """The constructor runs no job."""
    done: list[int] = []
    background = BackgroundJobs("packing", [(lambda: done.append(1), 1)])
    assert not background.started
    assert not background.done
    assert not done
    background.wait()
    assert done == [1]
    assert background.started
    assert background.done


def test_jobs_run_in_their_order() -> None:
    """In order on one thread."""
    done: list[int] = []
    BackgroundJobs("packing", [(lambda i=i: done.append(i), 1) for i in range(50)]).wait()  # type: ignore[misc]
    assert done == list(range(50))


def test_every_job_runs_once_on_several_threads() -> None:
    """They run concurrently: two jobs wait for each other."""
    both = threading.Barrier(2, timeout=SOON)
    done: list[int] = []
    jobs: list[Job] = [(lambda: void(both.wait()), 1)] * 2
    jobs += [(lambda i=i: done.append(i), 1) for i in range(50)]  # type: ignore[misc]
    BackgroundJobs("packing", jobs, threads=2).wait()
    assert sorted(done) == list(range(50))


def test_starting_twice_runs_the_jobs_once() -> None:
    """Every answer calls `start`."""
    done: list[int] = []
    background = BackgroundJobs("packing", [(lambda: done.append(1), 1)])
    for _ in range(3):
        background.start()
    background.wait()
    background.start()
    background.wait()
    assert done == [1]


def test_where_there_is_no_job_all_is_done_at_once() -> None:
    """Weights that are used as mapped need no packing."""
    background = BackgroundJobs("packing", [])
    assert background.done
    assert not background.running
    assert background.progress == ("packing", 0, 0)
    background.wait()
    background.close()


def test_progress_is_counted_in_the_sizes_of_the_jobs() -> None:
    """Before the first job, between jobs, and at the end."""
    step = threading.Semaphore(0)
    background = BackgroundJobs("packing", [(lambda: void(step.acquire()), size) for size in (3, 4, 5)])
    assert background.progress == ("packing", 0, 12)
    background.start()
    for done in (3, 7, 12):
        assert background.progress[1] < done
        step.release()
        until(lambda done=done: background.progress == ("packing", done, 12))  # type: ignore[misc]
        assert background.done is (done == 12)


def test_jobs_of_no_size_are_run_and_not_counted() -> None:
    """Such as a compilation: all weights can be ready before it ends."""
    release = threading.Event()
    background = BackgroundJobs("packing", [(lambda: release.wait(SOON), 0), (lambda: None, 3)])
    small = BackgroundJobs("packing", [(lambda: release.wait(SOON), 0)])
    assert not background.done
    assert small.done
    for jobs in (background, small):
        jobs.start()
    assert small.running
    assert small.done
    release.set()
    for jobs in (background, small):
        jobs.wait()
        assert jobs.done
        assert not jobs.running


def test_waiting_reports_the_progress() -> None:
    """The progress never decreases."""
    told: list[tuple[str, int, int]] = []
    BackgroundJobs("packing", [(lambda: time.sleep(0.01), 2)] * 5).wait(lambda *report: told.append(report))
    assert told
    assert told == sorted(told)
    assert {(stage, total) for stage, _, total in told} == {("packing", 10)}


def test_waiting_raises_the_error_of_a_job_and_the_rest_is_left() -> None:
    """The error is raised by each `wait`."""
    done: list[int] = []
    jobs: list[Job] = [(lambda: done.append(1), 1), (raising(MemoryError("no room")), 1), (lambda: done.append(2), 1)]
    background = BackgroundJobs("packing", jobs)
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            background.wait()
    background.close()
    assert done == [1]
    assert isinstance(background.error, MemoryError)
    assert not background.done


def test_a_job_that_failed_is_not_done() -> None:
    """Otherwise, an answer could claim to use packed weights that it does not use."""
    background = BackgroundJobs("packing", [(raising(MemoryError()), 1)])
    with pytest.raises(MemoryError):
        background.wait()
    background.close()
    assert not background.done


def test_the_first_of_several_errors_is_raised() -> None:
    """The other errors may be its consequences."""
    second_may_fail = threading.Event()

    def second() -> None:
        second_may_fail.wait(SOON)
        raise ValueError

    background = BackgroundJobs("packing", [(second, 1), (raising(MemoryError()), 1)], threads=2)
    with pytest.raises(MemoryError):
        background.wait()
    second_may_fail.set()
    background.close()
    with pytest.raises(MemoryError):
        background.wait()


def test_closing_waits_for_the_job_that_runs_and_leaves_the_rest() -> None:
    """After `close`, no thread uses the weights."""
    begun = threading.Event()
    done: list[int] = []

    def first() -> None:
        begun.set()
        time.sleep(0.1)
        done.append(1)

    background = BackgroundJobs("packing", [(first, 1), *[(lambda: done.append(2), 1)] * 1000])
    background.start()
    begun.wait(SOON)
    background.close()
    assert done == [1]
    assert not any(thread.is_alive() for thread in background._threads)
    assert not background.done
    background.close()  # closing again has no effect
    background.start()
    background.wait()
    assert done == [1]


def test_closing_before_the_start_runs_nothing() -> None:
    """Not even if it is started afterwards."""
    done: list[int] = []
    background = BackgroundJobs("packing", [(lambda: done.append(1), 1)])
    background.close()
    background.start()
    background.wait()
    assert not done


PROGRAM = """
import time
from llama_scratch.system.jobs import BackgroundJobs
background = BackgroundJobs("packing", [(lambda: time.sleep(0.1), 1)] * 300, threads=2)
background.start()
{}
"""


@pytest.mark.parametrize(("end", "code"), [("", 0), ("raise SystemExit(3)", 3)], ids=["end", "exit"])
def test_the_program_ends_without_the_jobs_that_are_left(end: str, code: int) -> None:
    """Python waits for the threads, which end after the running job although 15 seconds of jobs remain."""
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", PROGRAM.format(end)], capture_output=True, timeout=30)
    assert time.monotonic() - start < 7
    assert result.returncode == code
    assert result.stderr == b""


def test_a_long_job_ends_when_it_is_closed() -> None:
    """It ends at its next `report_progress`, whose value is visible until then. Outside of a job this has no effect."""
    report_progress("calibrating", 1, 2)
    said = threading.Event()

    def long() -> None:
        while True:
            report_progress("calibrating", 3, 7)
            said.set()
            time.sleep(0.001)

    background = BackgroundJobs("packing", [(long, 1), (long, 1)], 2)
    assert background.progress == ("packing", 0, 2)
    background.start()
    assert said.wait(SOON)
    assert background.progress == ("calibrating", 3, 7)
    background.close()
    assert not background.running
    assert not background.done
