"""Fault injection: signals, kills, full disks and concurrent writers.

    python -m tests.trust.faults [--part signals|kill|disk|together] [--count N]

Each trial forks a process (a fork starts immediately) and ends it at a random time. Afterwards every file must be
complete: either the old version or the new one. Temporary files must be gone after the next run, or immediately if
the process received a signal that it can handle.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import mmap
import os
import pwd
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from llama_scratch import __main__ as program
from llama_scratch import cli
from llama_scratch.errors import LlamaScratchError
from llama_scratch.precision import weight_cache
from llama_scratch.precision.weight_cache import PackedWeightCache
from llama_scratch.repl import session_file
from llama_scratch.repl.history import FileHistory
from llama_scratch.repl.state import Settings, Turn
from llama_scratch.sampling import Sampling
from llama_scratch.system.progress import silent
from tests.helpers.checkpoints import tiny_params, write_meta
from tests.helpers.loopback import File, serving
from tests.trust import record

SEED = 7
SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}
MOMENTS = {"signals": 1000, "kill": 200}
DEADLINE = 20.0  # seconds that a process has to end after a signal; then it counts as hung

NAME, FOLDER = "Llama3.2-1B", "/Llama-3.2-1B"
PUBLISHED = {
    "params.json": b'{"dim": 2048}',
    "tokenizer.model": b"IQ== 0\n" * 100,
    **{f"consolidated.{i:02}.pth": random.Random(i).randbytes(300_000) for i in range(2)},
}
CHECKLIST = "".join(f"{hashlib.md5(data).hexdigest()}  ./{name}\n" for name, data in PUBLISHED.items()).encode()
SHAPES = [(32, 128)] * 12
LAYOUTS: list[weight_cache.Layout] = [((shape, torch.int8), (shape[:1], torch.float32)) for shape in SHAPES]


class NotWholeError(Exception):
    """A file is neither the old version nor the new one, or a temporary file was left."""


def require(whole: bool, what: str) -> None:
    if not whole:
        raise NotWholeError(what)


# --- Kinds of files ---------------------------------------------------------------------------


class Stage:
    """One kind of file that the program writes.

    `done` counts the completed writes that the process has reported (in shared memory).

    Args:
        home: An empty home directory for this stage alone.
    """

    name = ""
    arguments: tuple[str, ...] = ()
    endless = False
    goes_on = False  # the next run resumes from the files that this one leaves

    def __init__(self, home: Path):
        self.home = home
        self.shared = mmap.mmap(-1, 8)

    @property
    def done(self) -> int:
        return int(struct.unpack("q", self.shared[:8])[0])

    @done.setter
    def done(self, count: int) -> None:
        self.shared[:8] = struct.pack("q", count)

    def work(self) -> int:
        """Run the program in the child process, by default its command line."""
        return cli_run(list(self.arguments))

    def check(self) -> int:
        """Check that every file is complete, and return the number of files."""
        raise NotImplementedError

    def left(self) -> list[Path]:
        """Temporary files and other leftovers next to the files."""
        raise NotImplementedError

    def next(self) -> None:
        """Run the program once more, without a fault."""
        require(self.work() == 0, f"{self.name}: the next run failed")


cli_run = cli.run


class History(Stage):
    """History entries: short lines, long lines and pastes of 200 kB.

    If `lossy`, entries may be missing because the disk was full.
    """

    name = "history"
    endless = True
    lossy = False

    def __init__(self, home: Path):
        super().__init__(home)
        self.begin()

    def begin(self) -> None:
        """Start with an empty file."""
        self.path.write_bytes(b"")
        self.first = self.done

    @property
    def path(self) -> Path:
        return self.home / "state/llama-scratch/history"

    @staticmethod
    def entry(i: int) -> str:
        chance = random.Random(i)
        size = chance.choice([5, 60, 5_000, 200_000])
        return f"{i} " + "".join(chance.choices("ab \nzé🙂", k=size)) + "."

    def work(self) -> int:
        for i in itertools.count(self.done):
            FileHistory(self.path).store_string(self.entry(i))
            self.done = i + 1
        return 0

    def check(self) -> int:
        entries = list(FileHistory(self.path).load_history_strings())[::-1]
        numbers = [int(entry.split()[0]) for entry in entries]
        require(entries == [self.entry(i) for i in numbers], "history: an entry is torn")
        if not self.lossy:
            known = list(range(self.first, self.first + len(entries)))
            require(numbers == known, "history: an entry is lost or out of order")
            require(self.first + len(entries) - self.done in (0, 1), "history: the last entry is lost")
            self.done = self.first + len(entries)
        if self.lossy or self.path.stat().st_size > 1_000_000:
            self.begin()
        return len(entries)

    def left(self) -> list[Path]:
        return [path for path in self.path.parent.iterdir() if path != self.path]

    def next(self) -> None:
        FileHistory(self.path).store_string(self.entry(self.done))
        self.done += 1


class Sessions(Stage):
    """A session file that is saved repeatedly, with varying lengths."""

    name = "sessions"
    endless = True

    @property
    def path(self) -> Path:
        return self.home / "session.jsonl"

    @staticmethod
    def version(i: int) -> session_file.SessionFile:
        settings = Settings(5, 0, Sampling())
        model = session_file.SavedModel("Tiny", "meta", "/nowhere", "0" * 64, 1)
        state = session_file.SavedState(settings, None, "0" * 64, [1, 2], "text")
        turns = [Turn(f"{i}", {"text": "x" * 200}) for _ in range(1 + 100 * (i % 5))]
        header = session_file.SessionHeader(
            "0.1.0", session_file.FORMAT_VERSION, model, "fp32", "cpu", 1, 128, 1.0, settings, None, True, state, {}
        )
        return session_file.SessionFile(replace(header, turns=len(turns)), turns)

    def work(self) -> int:
        for i in itertools.count(self.done):
            session_file.save(self.version(i), self.path)
            self.done = i + 1
        return 0

    def check(self) -> int:
        if not self.path.exists():
            require(self.done == 0, "sessions: the file is gone")
            return 0
        found = session_file.load(self.path)
        here = int(found.turns[0].input)
        require(here + 1 - self.done in (0, 1), f"sessions: version {here} after {self.done} saves")
        require(found == self.version(here), "sessions: the file differs from the saved version")
        self.done = here + 1
        return 1

    def left(self) -> list[Path]:
        return [path for path in self.path.parent.iterdir() if path.name.startswith(".llama")]

    def next(self) -> None:
        session_file.save(self.version(self.done), self.path)
        self.done += 1


class Cache(Stage):
    """Cached quantized weights of 40 models, with space for ten."""

    name = "int8 cache"
    endless = True
    models = 40

    def __init__(self, home: Path):
        super().__init__(home)
        for model in range(self.models + 1):
            self.source(model).write_bytes(b"weights")

    @property
    def folder(self) -> Path:
        return self.home / "cache/llama-scratch/weights"

    def source(self, model: int) -> Path:
        return self.home / f"weights{model}"

    @staticmethod
    def piece(model: int, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, _ = SHAPES[i]
        return torch.full(SHAPES[i], (model + i) % 100, dtype=torch.int8), torch.full((rows,), float(model))

    def pack(self, model: int) -> None:
        keeping = PackedWeightCache([self.source(model)], LAYOUTS)
        for i in range(len(SHAPES)):
            if keeping.get(i) is None:
                keeping.put(i, *self.piece(model, i))

    def work(self) -> int:
        weight_cache._MAX_BYTES = 10 * (64 + sum(rows * columns + 4 * rows for rows, columns in SHAPES))
        for i in itertools.count(self.done):
            self.pack(i % self.models)
            self.done = i + 1
        return 0

    def check(self) -> int:
        whole = 0
        for model in range(self.models):
            keeping = PackedWeightCache([self.source(model)], LAYOUTS)
            if keeping._path is None or not keeping._path.exists():
                continue
            for i in range(len(SHAPES)):
                found = keeping.get(i)
                right = found is not None and all(map(torch.equal, found, self.piece(model, i)))
                require(right, f"int8 cache: piece {i} of model {model} differs from the stored one")
            whole += 1
        return whole

    def left(self) -> list[Path]:
        """Stale `.part` files; newer ones are resumed by the next run with their model."""
        parts = [path for path in self.folder.iterdir() if path.suffix] if self.folder.exists() else []
        return [path for path in parts if time.time() - path.stat().st_mtime > weight_cache._STALE_AFTER_S]

    def next(self) -> None:
        self.pack(self.done % self.models)
        (self.folder / "x.part").write_bytes(b"left")
        os.utime(self.folder / "x.part", (0, 0))
        self.source(self.models).touch()
        self.pack(self.models)
        self.done += 1


class Conversion(Stage):
    """`convert` of a small model to one of the three formats."""

    def __init__(self, home: Path, form: str, source: Path):
        super().__init__(home)
        self.name = f"convert to {form}"
        self.target = home / "out" / ("Tiny.gguf" if form == "gguf" else "Tiny")
        self.target.parent.mkdir()
        self.arguments = ("convert", str(source), str(self.target), "--to", form)
        require(self.work() == 0, f"{self.name}: it failed")
        self.right = self.contents()
        self.remove()

    @property
    def checksum(self) -> Path:
        """The checksum file of a single-file model, in the same directory."""
        return self.target.with_name(f"{self.target.name}.md5")

    def contents(self) -> dict[str, bytes]:
        files = sorted(self.target.iterdir()) if self.target.is_dir() else [self.target, self.checksum]
        return {path.name: path.read_bytes() for path in files if path.exists()}

    def remove(self) -> None:
        shutil.rmtree(self.target) if self.target.is_dir() else self.target.unlink()
        self.checksum.unlink(missing_ok=True)

    def check(self) -> int:
        if not self.target.exists():
            return 0
        found = self.contents()
        if self.target.is_file():  # a single file is complete even before its checksum is written
            found = {**self.right, **found}
        require(found == self.right, f"{self.name}: the target is not the complete model")
        self.remove()
        return len(self.right)

    def left(self) -> list[Path]:
        return [path for path in self.target.parent.iterdir() if path != self.target]


class Download(Stage):
    """`pull` of two shards from Meta's download link.

    Partial files are resumed, so they are not leftovers.
    """

    name = "download"
    goes_on = True

    def __init__(self, home: Path, server: str):
        super().__init__(home)
        self.arguments = ("pull", NAME, "--from-url", f"{server}/*?Signature=x")
        self.target = home / ".llama/checkpoints" / NAME

    def check(self) -> int:
        if not self.target.exists():
            return 0
        found = {path.name: path.read_bytes() for path in self.target.iterdir()}
        require(found == {**PUBLISHED, "checklist.chk": CHECKLIST}, "download: the directory is not the complete model")
        shutil.rmtree(self.target)
        return len(found)

    def left(self) -> list[Path]:
        root = self.target.parent
        return [path for path in root.iterdir() if path != self.target] if root.exists() else []


class Remote(Stage):
    """A model that is downloaded from gs:// into the cache."""

    name = "remote cache"
    goes_on = True
    address = "gs://bucket/models/Tiny-Llama"

    @property
    def folder(self) -> Path:
        return self.home / "cache/llama-scratch/remote"

    def work(self) -> int:
        from llama_scratch.download.cloud import local_copy

        local_copy(self.address, silent)
        return 0

    def check(self) -> int:
        count = 0
        for path in self.folder.rglob("*") if self.folder.exists() else []:
            if path.is_file() and path.suffix != ".part":
                require(path.read_bytes() == PUBLISHED[path.name], f"remote cache: {path.name} is incomplete")
                count += 1
        if count == len(PUBLISHED):
            shutil.rmtree(self.folder)
        return count

    def left(self) -> list[Path]:
        return list(self.folder.rglob("*.part"))


# --- One trial --------------------------------------------------------------------------------


@dataclass
class Figures:
    """Counts and times of a run."""

    moments: dict[str, dict[str, int]] = field(default_factory=dict)
    files_checked: int = 0
    left_by_told: int = 0
    left_by_killed: int = 0
    ended_in_time: int = 0
    with_a_wrong_word: int = 0
    worst_exit_seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "moments": sum(sum(stages.values()) for stages in self.moments.values()),
            "by_signal": {name: sum(stages.values()) for name, stages in self.moments.items()},
            "by_stage": {
                stage: sum(stages.get(stage, 0) for stages in self.moments.values())
                for stage in sorted({stage for stages in self.moments.values() for stage in stages})
            },
            "ended_by_it": self.ended_in_time,
            "called_unexpected_by_a_library": self.with_a_wrong_word,
            "files_checked": self.files_checked,
            "not_whole": 0,
            "left_until_the_next_run": self.left_by_told + self.left_by_killed,
            "left_until_the_next_run_though_not_killed": self.left_by_told,
            "left_after_the_next_run": 0,
            "worst_exit_seconds": round(self.worst_exit_seconds, 3),
        }


@dataclass
class Run:
    """A running child process. It executes `work`, by default the stage's own.

    Args:
        stage: The kind of file that it writes.
        work: Replaces `stage.work`.
        limit: Maximum file size in bytes.
        number: Distinguishes concurrent processes.
    """

    stage: Stage
    work: Callable[[], int] | None = None
    limit: int | None = None
    number: int = 0

    def __post_init__(self) -> None:
        self.log = Path(tempfile.gettempdir()) / f"faults-{os.getpid()}-{self.number}.log"  # not on the full disk
        ready, tell = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            self._run(tell)
        os.close(tell)
        os.read(ready, 1)
        os.close(ready)

    def end(self, number: int | None, wait: float = 0.0) -> tuple[int, float, str]:
        """Wait for the process to end, optionally after a signal.

        Args:
            number: The signal to send, if any.
            wait: Seconds before the signal.

        Returns:
            The exit code, the seconds that it took to end, and its output.

        Raises:
            NotWholeError: If the process does not end in time or prints a traceback.
        """
        if number is not None:
            time.sleep(wait)
            os.kill(self.child, number)
        told = time.monotonic()
        while not (ended := os.waitpid(self.child, os.WNOHANG))[0]:
            if time.monotonic() - told > DEADLINE:
                os.kill(self.child, signal.SIGKILL)
                os.waitpid(self.child, 0)
                raise NotWholeError(f"{self.stage.name}: it did not end within {DEADLINE:g} s")
            time.sleep(0.0005)
        code, words = os.waitstatus_to_exitcode(ended[1]), self.log.read_text(errors="replace")
        self.log.unlink()
        # A library may turn an interrupt into another error; the exit code is still that of the interrupt.
        wrong = ("Traceback", "Exception", *(() if number else ("unexpected",)))
        require(not any(word in words for word in wrong), f"{self.stage.name}: it printed {words}")
        return code, time.monotonic() - told, words

    def _run(self, tell: int) -> NoReturn:
        """Run the program's `main` in the child process, which exits here."""
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            for stream in (1, 2):
                os.dup2(log, stream)
            sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self.limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))

            def run(arguments: list[str]) -> int:
                os.write(tell, b".")
                try:
                    return (self.work or self.stage.work)()
                except LlamaScratchError as error:
                    print(error, file=sys.stderr)
                    return error.exit_code

            cli.run = run
            program.main()
        except SystemExit as ended:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(ended.code or 0))
        except BaseException:  # noqa: BLE001 - the child must never return to the caller's code
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(99)


def at_moments(stages: list[Stage], numbers: Mapping[str, int], count: int, seed: int) -> Figures:
    """Run `count` trials, alternating stages and signals.

    Args:
        stages: The kinds of files.
        numbers: Name → number of each signal.
        count: Number of trials.
        seed: Seed of the random times.

    Returns:
        The figures of all trials.

    Raises:
        NotWholeError: At the first trial with an incomplete file, a leftover or a wrong exit code.
    """
    chance, figures = random.Random(seed), Figures()
    lasts: dict[str, float] = {}
    turns = itertools.cycle(itertools.product(numbers.items(), stages))
    for i, ((signal_name, number), stage) in zip(range(count), turns, strict=False):
        use(stage.home)
        if stage.name not in lasts:
            lasts[stage.name] = _lasts(stage)
        code, seconds, words = Run(stage).end(number, chance.random() * lasts[stage.name])
        expected = -number if number == signal.SIGKILL else 128 + number
        require(code in (expected, 0), f"{stage.name}: {signal_name} ended it with {code}: {words}")
        figures.moments.setdefault(signal_name, {}).setdefault(stage.name, 0)
        figures.moments[signal_name][stage.name] += 1
        figures.ended_in_time += code == expected
        figures.with_a_wrong_word += "unexpected" in words
        figures.worst_exit_seconds = max(figures.worst_exit_seconds, seconds)
        figures.files_checked += stage.check()
        left = stage.left()
        if number == signal.SIGKILL:
            figures.left_by_killed += bool(left)
        elif not stage.goes_on and not isinstance(stage, Cache):  # the cache keeps its parts for the next run
            figures.left_by_told += bool(left)
        if left and not (stage.goes_on and chance.random() < 0.7):  # otherwise the next trial interrupts the resume
            stage.next()
            figures.files_checked += stage.check()
            still = [path.name for path in stage.left()]
            require(not still, f"{stage.name}: the next run left {still}")
        if i % 50 == 49:
            print(f"{i + 1} of {count} moments", file=sys.stderr)
    return figures


def _lasts(stage: Stage) -> float:
    """Duration of an undisturbed run in seconds; fixed for endless stages."""
    if stage.endless:
        return 0.1
    code, seconds, words = Run(stage).end(None)
    require(code == 0, f"{stage.name}: it ended with {code}: {words}")
    stage.check()
    return seconds * 1.1


# --- Environment ------------------------------------------------------------------------------


def use(home: Path) -> None:
    """Make a folder the home of all processes that are started from now on."""
    os.environ["HOME"] = str(home)
    for kind in ("state", "cache", "config", "data"):
        os.environ[f"XDG_{kind.upper()}_HOME"] = str(home / kind)


@contextlib.contextmanager
def servers() -> Iterator[str]:
    """Run Meta's server and a bucket in a slow process; yields their address."""
    ready, tell = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            _serve(tell, parent)
        finally:
            os._exit(0)
    os.close(tell)
    address = os.read(ready, 100).decode()
    os.close(ready)
    try:
        yield address
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(tell: int, parent: int) -> None:
    from tests.helpers.cloud_storage import Storage

    with serving() as server:
        storage = Storage(server)

        def slowly(_: int) -> None:
            time.sleep(0.002)

        for name, data in PUBLISHED.items():
            storage.put(f"models/Tiny-Llama/{name}", data).sent = slowly
        for name, data in {**PUBLISHED, "checklist.chk": CHECKLIST}.items():
            server.files[f"{FOLDER}/{name}"] = File(data, sent=slowly)
        os.write(tell, server.url.encode())
        os.close(tell)
        while os.getppid() == parent:
            time.sleep(0.2)


@contextlib.contextmanager
def stages(place: Path | None = None) -> Iterator[list[Stage]]:
    """All stages, each with its own home below `place`."""
    from blobfile._common import global_pool_director

    from tests.helpers.cloud_storage import Pool

    torch.set_num_threads(1)
    os.environ["BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH"] = "1"
    with tempfile.TemporaryDirectory(prefix="faults-", dir=place) as folder, servers() as address:
        Path(folder).chmod(0o755)  # readable by another user, see `without_a_home`
        pool = Pool(address)
        global_pool_director.get_http_pool = lambda: pool  # type: ignore[method-assign]
        source = write_meta(Path(folder) / "Tiny", params=tiny_params(dim=128, n_heads=2, n_kv_heads=1, n_layers=2))
        makers: list[Callable[[Path], Stage]] = [
            History,
            Sessions,
            Cache,
            *(partial(Conversion, form=form, source=source) for form in ("meta", "hf", "gguf")),
            partial(Download, server=address),
            Remote,
        ]
        found = []
        for number, make in enumerate(makers):
            home = Path(folder) / f"home{number}"
            for kind in ("state/llama-scratch", "cache"):
                (home / kind).mkdir(parents=True)
            use(home)
            found.append(make(home))
        yield found


# --- A full disk ------------------------------------------------------------------------------


def on_a_full_disk(stages: list[Stage], count: int, seed: int, *, mounted: bool) -> dict[str, Any]:
    """Run each program with a few kilobytes of disk space.

    It must report the error or continue, and files must stay complete.

    Args:
        stages: The kinds of files.
        count: Runs per stage.
        seed: Seed of the random sizes.
        mounted: Whether the stages are on a small disk that can be filled. Otherwise the file size is limited.

    Returns:
        The figures for the record.

    Raises:
        NotWholeError: If a file is incomplete, a leftover remains or an exit code is wrong.
    """
    chance, runs, refused, files = random.Random(seed), 0, 0, 0
    for stage in stages:
        use(stage.home)
        for _ in range(count):
            size = 4096 * int(2 ** chance.uniform(0, 8))
            if isinstance(stage, History):
                stage.lossy = True
            with _filled(stage.home.parent, size) if mounted else contextlib.nullcontext():
                run = Run(stage, limit=None if mounted else size)
                code, _, words = run.end(signal.SIGINT if stage.endless else None, 0.05)
            require(code in (0, 1, 130), f"{stage.name}: with {size:,} bytes free it ended with {code}: {words}")
            runs, refused = runs + 1, refused + (code == 1)
            files += stage.check()
            require(
                stage.goes_on or isinstance(stage, Cache) or not stage.left(), f"{stage.name}: it left {stage.left()}"
            )
            if isinstance(stage, History):
                stage.lossy = False
        stage.next()
        files += stage.check()
        require(not stage.left(), f"{stage.name}: the run after a full disk left {stage.left()}")
    require(refused > 0, "the disk was never full")
    return {"runs": runs, "refused_in_a_sentence": refused, "files_checked": files, "real_disk": mounted}


@contextlib.contextmanager
def _filled(disk: Path, size: int) -> Iterator[None]:
    """Leave `size` free bytes on a disk inside the context."""
    filler = disk / "filler"
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
    try:
        os.posix_fallocate(descriptor, 0, max(1, shutil.disk_usage(disk).free - size))
        yield
    finally:
        os.close(descriptor)
        filler.unlink()


@contextlib.contextmanager
def small_disk() -> Iterator[tuple[Path, bool]]:
    """Mount a 64 MB disk if possible; yields its folder and whether it is mounted."""
    with tempfile.TemporaryDirectory(prefix="faults-disk-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder]
        mounted = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True, check=False).returncode
        try:
            yield Path(folder), mounted
        finally:
            if mounted:
                subprocess.run(["umount", "-l", folder], check=True)


# --- No home, no streams ----------------------------------------------------------------------


def without_a_home(stages: list[Stage]) -> dict[str, int]:
    """Run with a home that is missing, read-only, a file or relative.

    Commands that need no home work, and the others report the problem.
    """
    stage = next(stage for stage in stages if isinstance(stage, Download))
    model = str(stage.home.parent / "Tiny")
    place = stage.home.parent / "homes"
    place.mkdir()
    (place / "file").write_bytes(b"")
    (place / "read-only").mkdir(mode=0o555)
    homes: dict[str, dict[str, str]] = {
        "none": {},
        "empty": {"HOME": ""},
        "missing": {"HOME": str(place / "file/missing")},
        "a file": {"HOME": str(place / "file")},
        "read-only": {"HOME": str(place / "read-only")},
        "relative": {"HOME": str(place / "read-only"), "XDG_CACHE_HOME": "here", "XDG_STATE_HOME": "here"},
        "empty folders": {"HOME": str(place / "read-only"), "XDG_CACHE_HOME": "", "XDG_STATE_HOME": ""},
    }
    commands = {
        ("--model-dir", model, "--precision", "int8", "--prompt", "the"): (0,),
        ("info", model): (0,),
        ("--model", "smollm2", "info"): (1, 3),
        stage.arguments: (1,),
    }
    here = place / "here"
    here.mkdir()
    runs = 0
    for (name, home), (arguments, codes) in itertools.product(homes.items(), commands.items()):

        def work(home: dict[str, str] = home, arguments: tuple[str, ...] = arguments) -> int:
            os.chdir(here)
            here.chmod(0o777)
            for kind in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
                os.environ.pop(kind, None)
            os.environ.update(home)
            if not home.get("HOME"):  # as in a container whose user has no passwd entry
                pwd.getpwuid = _nobody
            if os.geteuid() == 0:  # root ignores read-only permissions
                os.seteuid(65534)
            return cli_run(list(arguments))

        code, _, words = Run(stage, work).end(None)
        require(code in codes, f"home {name}: {arguments} ended with {code}: {words}")
        require(code == 0 or words.count("llama-scratch: ") == 1, f"home {name}: {arguments} printed {words}")
        require(not list(here.iterdir()), f"home {name}: {arguments} wrote {list(here.iterdir())} in its directory")
        runs += 1
    return {"homes": len(homes), "runs": runs}


def _nobody(uid: int) -> NoReturn:
    raise KeyError(uid)


def without_streams(model: Path) -> dict[str, int]:
    """Run with closed streams, or streams to a full disk.

    Output that cannot be written gives exit code 1 and a message.

    The other commands keep their exit code.
    """
    commands: dict[tuple[str, ...], bool] = {  # command → whether it writes to stdout
        ("--help",): True,
        ("--version",): True,
        ("info", str(model)): True,
        ("verify", str(model)): True,
        ("--model-dir", str(model), "--prompt", "the"): True,
        ("--model-dir", str(model), "--prompt", "the", "--json"): True,
        ("--model-dir", str(model / "missing"), "--prompt", "the"): False,
        ("convert", str(model), str(model / "params.json"), "--to", "hf"): False,
        ("pull", "nothing-of-that-name"): False,
    }
    runs = 0
    for arguments, says in commands.items():
        expected = None
        for streams in ("", "<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"):
            line = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", "llama_scratch", *arguments]
            done = subprocess.run(
                line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
            )
            expected = done.returncode if expected is None else expected
            right = 1 if says and ">/dev/full" in streams.split() else expected
            require(
                done.returncode == right,
                f"{arguments} {streams}: {done.returncode}, expected {right}: {done.stderr}",
            )
            require(
                "Traceback" not in done.stderr and "Exception" not in done.stderr,
                f"{arguments} {streams}: {done.stderr}",
            )
            if right != expected:
                require(done.stderr.count("\n") == 1, f"{arguments} {streams}: {done.stderr}")
            runs += 1
    return {"commands": len(commands), "runs": runs}


# --- Concurrent processes ---------------------------------------------------------------------


def together(stages: list[Stage], programs: int, rounds: int, lines: int) -> dict[str, int]:
    """Write the same files from several processes.

    Nothing may be lost or mixed, and a process that must wait says so.

    Args:
        stages: The kinds of files.
        programs: Number of concurrent processes.
        rounds: Repetitions per stage.
        lines: History entries per process.

    Returns:
        The figures for the record.
    """
    files = waited = entries = 0
    for stage, _ in itertools.product(stages, range(rounds)):
        use(stage.home)
        if isinstance(stage, History):
            entries += _histories(stage, programs, lines)
            continue
        done = [Run(stage, number=number) for number in range(programs)]
        ends = [run.end(signal.SIGINT if stage.endless else None, 0.3 / programs) for run in done]
        codes = [code for code, _, _ in ends]
        words = "".join(words for _, _, words in ends)
        if stage.endless:
            require(set(codes) == {130}, f"{stage.name}: {codes}: {words}")
        else:
            require(0 in codes and set(codes) <= {0, 1, 2}, f"{stage.name}: {codes}: {words}")
            waited += len(codes) - codes.count(0)
        if isinstance(stage, Sessions):
            stage.done = int(session_file.load(stage.path).turns[0].input) + 1
        files += stage.check()
        require(
            stage.goes_on or isinstance(stage, Cache) or not stage.left(), f"{stage.name}: they left {stage.left()}"
        )
        stage.next()
        files += stage.check()
        require(not stage.left(), f"{stage.name}: the next run left {stage.left()}")
    return {
        "programs": programs,
        "rounds": rounds,
        "files_checked": files,
        "history_entries": entries,
        "told_to_wait": waited,
    }


def _histories(stage: History, programs: int, lines: int) -> int:
    """Append to one history from several processes.

    All entries must be complete and in the order of each process.
    """
    stage.begin()
    history = FileHistory(stage.path)

    def entry(program: int, i: int) -> str:
        return f"{program} {stage.entry(100 * program + i)}"

    def write(program: int) -> int:
        for i in range(lines):
            history.store_string(entry(program, i))
        return 0

    done = [Run(stage, lambda number=number: write(number), number=number) for number in range(programs)]  # type: ignore[misc]
    for run in done:
        run.end(None)
    found = list(history.load_history_strings())[::-1]
    for number in range(programs):
        own = [text for text in found if text.startswith(f"{number} ")]
        require(
            own == [entry(number, i) for i in range(lines)], f"history: entries of program {number} are lost or mixed"
        )
    stage.begin()
    return len(found)


# --- The command ------------------------------------------------------------------------------

PARTS = ("signals", "kill", "disk", "together")


def run(parts: tuple[str, ...] = PARTS, count: int | None = None, seed: int = SEED) -> dict[str, Any]:
    """Run some parts and return their figures.

    Args:
        parts: Names from `PARTS`.
        count: Number of trials with signals and with kills; if given, the other parts are shortened too.
        seed: Random seed.
    """
    figures: dict[str, Any] = {"seed": seed}
    short = count is not None
    start = time.monotonic()
    with stages() as all_stages:
        for part, numbers in (("signals", SIGNALS), ("kill", {"SIGKILL": signal.SIGKILL})):
            if part in parts:
                figures[part] = at_moments(all_stages, numbers, count or MOMENTS[part], seed).as_json()
        if "together" in parts:
            figures["together"] = together(all_stages, *((3, 1, 12) if short else (4, 10, 60)))
        if "disk" in parts:
            figures["no_home"] = without_a_home(all_stages)
            if not short:
                figures["streams"] = without_streams(all_stages[0].home.parent / "Tiny")
    if "disk" in parts:
        with small_disk() as (folder, mounted), stages(folder) as all_stages:
            figures["full_disk"] = on_a_full_disk(all_stages, 1 if short else 25, seed, mounted=mounted)
    figures["seconds"] = round(time.monotonic() - start, 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="run only this part (default: all, and record the figures)")
    parser.add_argument("--count", type=int, help="trials with signals and with kills (default: 1,000 and 200)")
    options = parser.parse_args()
    figures = run((options.part,) if options.part else PARTS, options.count)
    print(json.dumps(figures, indent=2))
    if options.part is None and options.count is None:
        record.write("faults", figures)


if __name__ == "__main__":
    main()
