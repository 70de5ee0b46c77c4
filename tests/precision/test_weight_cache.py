"""The cache of packed weights: intact pieces are used, all others are packed again silently."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_scratch.llama import Llama
from llama_scratch.precision import weight_cache
from llama_scratch.precision.weight_cache import Layout, PackedWeightCache
from llama_scratch.system.atomic_files import locked
from tests.helpers import ROOT
from tests.helpers.checkpoints import write_meta

SHAPES = [(5, 8), (3, 7), (1, 1)]
LAYOUTS: list[Layout] = [((shape, torch.int8), (shape[:1], torch.float32)) for shape in SHAPES]
TABLE = 8 * len(SHAPES)
# Start of each piece, aligned to a cache line. Values come first, then scales.
STARTS = [64, 192, 320]
SIZE = 448
PROMPT = [1, 2, 3, 4]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The weight file."""
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder, which does not exist before the first file."""
    return Path(os.environ["XDG_CACHE_HOME"]) / "llama-scratch" / "weights"


def random_piece(shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random values and scales."""
    values = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    return values, torch.randn(shape[0], generator=generator)


def made(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [random_piece(shape, generator) for shape in SHAPES]


def keep(source: Path, pieces: list[tuple[Tensor, Tensor]] | None = None) -> None:
    """Put all pieces, the last one first, as threads might."""
    keeping = PackedWeightCache([source], LAYOUTS)
    for i, piece in reversed(list(enumerate(pieces or made()))):
        keeping.put(i, *piece)


def same(a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor] | None) -> bool:
    return a is not None and b is not None and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


# --- Pieces -----------------------------------------------------------------------------------


def test_what_was_kept_is_what_comes_back(source: Path, folder: Path) -> None:
    """Bit-identical and with the same dtypes, from one file of the expected size."""
    assert [PackedWeightCache([source], LAYOUTS).get(i) for i in range(3)] == [None] * 3
    keep(source)
    (file,) = files(folder)
    assert file.stat().st_size == SIZE
    keeping = PackedWeightCache([source], LAYOUTS)
    for i, piece in enumerate(made()):
        back = keeping.get(i)
        assert same(back, piece)
        assert back is not None
        assert (back[0].dtype, back[1].dtype, tuple(back[0].shape)) == (torch.int8, torch.float32, SHAPES[i])


def test_what_is_kept_is_mapped_and_never_written(source: Path, folder: Path) -> None:
    """The values are memory-mapped; putting them again changes nothing."""
    keep(source)
    (file,) = files(folder)
    before = file.read_bytes()
    keeping = PackedWeightCache([source], LAYOUTS)
    back = keeping.get(0)
    assert back is not None
    assert isinstance(keeping._data, np.memmap)
    assert back[0].data_ptr() == keeping._data.ctypes.data + STARTS[0]
    back[0].zero_()  # changes a copy of the page, not the file
    keeping.put(0, *made(seed=1)[0])
    assert file.read_bytes() == before


def test_a_file_is_not_seen_before_it_is_whole(source: Path, folder: Path) -> None:
    """Until then, it is a .part file that no other process reads."""
    keeping = PackedWeightCache([source], LAYOUTS)
    for i, piece in enumerate(made()[:2]):
        keeping.put(i, *piece)
    (part,) = files(folder)
    assert part.suffix == ".part"
    assert PackedWeightCache([source], LAYOUTS).get(0) is None
    keeping.put(2, *made()[2])
    (file,) = files(folder)
    assert file.suffix == ""
    assert same(PackedWeightCache([source], LAYOUTS).get(2), made()[2])


def test_only_the_person_reads_the_folder(source: Path, folder: Path) -> None:
    """The weights may be confidential."""
    keep(source)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("byte", [*range(TABLE), *range(STARTS[0], SIZE)])
def test_a_flipped_byte_anywhere_is_noticed(source: Path, folder: Path, byte: int) -> None:
    """In the table, values or scales: only this piece is packed again, the others are used."""
    keep(source)
    (file,) = files(folder)
    whole = file.read_bytes()
    data = bytearray(whole)
    data[byte] ^= 1
    file.write_bytes(data)
    damaged = byte // 8 if byte < TABLE else sum(byte >= start for start in STARTS) - 1
    keeping = PackedWeightCache([source], LAYOUTS)
    for i, piece in enumerate(made()):
        assert keeping.get(i) is None if i == damaged else same(keeping.get(i), piece)
    assert files(folder) == [file.with_suffix(".part")]
    for i, piece in enumerate(made()):
        keeping.put(i, *(piece if i == damaged else made(seed=1)[i]))
    assert files(folder) == [file]
    assert file.read_bytes() == whole


def cut(file: Path) -> None:
    os.truncate(file, SIZE - 1)


def lengthen(file: Path) -> None:
    os.truncate(file, SIZE + 1)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def link(file: Path) -> None:
    """A link to a complete file, which another user could change."""
    file.rename(file.parent.parent / "elsewhere")
    target = "../elsewhere"
    file.symlink_to("./" * ((SIZE - len(target)) // 2) + target)
    assert file.lstat().st_size == SIZE  # the size of a link is the length of its target's path


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


@pytest.mark.parametrize("spoil", [cut, lengthen, empty, link, dangling])
def test_what_is_no_whole_file_is_replaced(source: Path, folder: Path, spoil: Callable[[Path], None]) -> None:
    """It is not read, and the next pieces replace it."""
    keep(source)
    (file,) = files(folder)
    spoil(file)
    assert PackedWeightCache([source], LAYOUTS).get(0) is None
    keep(source, made(seed=1))
    assert same(PackedWeightCache([source], LAYOUTS).get(0), made(seed=1)[0])
    assert file.is_file()
    assert not file.is_symlink()


def test_a_directory_in_its_place_is_left_alone(source: Path, folder: Path) -> None:
    """Then nothing can be cached, which is not an error."""
    keep(source)
    (file,) = files(folder)
    file.unlink()
    file.mkdir()
    for _ in range(2):
        assert PackedWeightCache([source], LAYOUTS).get(0) is None
        keep(source)
    assert file.is_dir()


def test_a_file_of_someone_else_is_not_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be correct, but it is not trusted."""
    keep(source)
    assert PackedWeightCache([source], LAYOUTS).get(0) is not None
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert PackedWeightCache([source], LAYOUTS).get(0) is None


# --- File names -------------------------------------------------------------------------------


def touch(source: Path, patch: pytest.MonkeyPatch) -> None:
    status = source.stat()
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def grow(source: Path, patch: pytest.MonkeyPatch) -> None:
    status = source.stat()
    source.write_bytes(b"weights!")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))


def other_torch(source: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "__version__", "2.99.0")


def other_cpu(source: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX999")


def other_format(source: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_cache, "_FORMAT_VERSION", 999)


@pytest.mark.parametrize("change", [touch, grow, other_torch, other_cpu, other_format])
def test_pieces_of_something_else_are_not_used(
    source: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    """From an older weight file, another version of torch or another CPU."""
    keep(source)
    change(source, monkeypatch)
    assert PackedWeightCache([source], LAYOUTS).get(0) is None


def test_pieces_of_other_shapes_or_of_another_file_are_not_used(source: Path, tmp_path: Path) -> None:
    """Even if the number of bytes is the same."""
    keep(source)
    assert PackedWeightCache([source], LAYOUTS).get(0) is not None
    assert PackedWeightCache([source], [LAYOUTS[i] for i in (1, 0, 2)]).get(0) is None
    other = source.rename(tmp_path / "other")
    assert PackedWeightCache([other], LAYOUTS).get(0) is None


def test_a_file_is_the_same_by_every_path_to_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path, or a link."""
    keep(source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(source)
    for path in (Path("weights"), Path("link")):
        assert PackedWeightCache([path], LAYOUTS).get(0) is not None


# --- The folder -------------------------------------------------------------------------------


@pytest.mark.parametrize("age", [6, 8])
def test_a_stale_part_file_is_removed(source: Path, folder: Path, age: int) -> None:
    """After a week, unless a process is writing it and so holds its lock."""
    folder.mkdir(parents=True, mode=0o700)
    left, running = (folder / f"{letter * 32}.part" for letter in "ab")
    for part in (left, running):
        part.write_bytes(b"part")
        os.utime(part, (time.time() - age * 86400,) * 2)
    with locked(running) as ours:
        assert ours
        keep(source)
    assert left.exists() == (age < 7)
    assert running.exists()


def test_part_files_make_room_too(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are removed first, except one that a process is writing."""
    folder.mkdir(parents=True, mode=0o700)
    running, left, newer = (folder / f"{letter * 32}.part" for letter in "abc")
    for age, part in enumerate((newer, left, running)):
        part.write_bytes(bytes(SIZE))
        os.utime(part, (time.time() - age,) * 2)
    monkeypatch.setattr(weight_cache, "_MAX_BYTES", 3 * SIZE)
    with locked(running) as ours:
        assert ours
        keep(source)
    assert not left.exists()
    assert running.exists()
    assert newer.exists()


def test_one_program_at_a_time_keeps_a_model(source: Path, folder: Path) -> None:
    """The other one's pieces are not cached, and neither waits."""
    first, second = PackedWeightCache([source], LAYOUTS), PackedWeightCache([source], LAYOUTS)
    first.put(0, *made()[0])
    second.put(0, *made(seed=1)[0])
    assert len(files(folder)) == 1
    first.put(1, *made()[1])
    second.put(1, *made(seed=1)[1])
    second.put(2, *made(seed=1)[2])
    assert PackedWeightCache([source], LAYOUTS).get(0) is None
    first.put(2, *made()[2])
    back = PackedWeightCache([source], LAYOUTS)
    assert all(same(back.get(i), piece) for i, piece in enumerate(made()))


@pytest.mark.parametrize("which", ["file", "folder"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_can_write_is_not_read(source: Path, folder: Path, which: str, mode: int) -> None:
    keep(source)
    (file,) = files(folder)
    path = file if which == "file" else folder
    assert PackedWeightCache([source], LAYOUTS).get(0) is not None
    path.chmod(path.stat().st_mode | mode)
    assert PackedWeightCache([source], LAYOUTS).get(0) is None


def test_a_pipe_in_its_place_is_not_waited_for(source: Path, folder: Path) -> None:
    keep(source)
    (file,) = files(folder)
    file.unlink()
    os.mkfifo(file)
    assert PackedWeightCache([source], LAYOUTS).get(0) is None
    keep(source)
    assert same(PackedWeightCache([source], LAYOUTS).get(0), made()[0])


@pytest.mark.parametrize("most", [4 * SIZE, 3 * SIZE, 2 * SIZE, SIZE])
def test_the_least_recently_used_go_first(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """The new file counts, and reading a file counts as use."""
    monkeypatch.setattr(weight_cache, "_MAX_BYTES", most)
    sources = [tmp_path / name for name in "abcd"]
    names = []
    for source in sources:
        source.write_bytes(b"weights")
        path = PackedWeightCache([source], LAYOUTS)._path
        assert path is not None
        names.append(path)
    for age, source in enumerate(sources[:3]):  # the first is the oldest of three
        monkeypatch.setattr(weight_cache, "_MAX_BYTES", 1 << 30)
        keep(source)
        os.utime(names[age], (1000 + age, 1000 + age))
    assert PackedWeightCache([sources[0]], LAYOUTS).get(0) is not None  # now the most recently used
    monkeypatch.setattr(weight_cache, "_MAX_BYTES", most)
    keep(sources[3])
    fit = most // SIZE
    by_use = [names[3], names[0], names[2], names[1]]
    assert {name for name in names if name.exists()} == set(by_use[:fit])


def test_what_is_too_large_is_not_kept(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not displace other files."""
    (other := tmp_path / "other").write_bytes(b"weights")
    keep(other)
    monkeypatch.setattr(weight_cache, "_MAX_BYTES", SIZE - 1)
    keep(source)
    assert PackedWeightCache([source], LAYOUTS).get(0) is None
    assert PackedWeightCache([other], LAYOUTS).get(0) is not None


@pytest.mark.skipif(os.name == "nt", reason="permissions are other ones on Windows")
@pytest.mark.parametrize("how", ["a file", "below a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_no_error(source: Path, folder: Path, how: str) -> None:
    """Then every run packs its weights itself."""
    folder.parent.mkdir(parents=True)
    if how == "a file":
        folder.write_bytes(b"")
    elif how == "below a file":
        folder.parent.rmdir()
        folder.parent.write_bytes(b"")
    elif os.getuid() == 0:
        pytest.skip("root writes everywhere")
    else:
        folder.parent.chmod(0o500)
    try:
        keep(source)
        assert PackedWeightCache([source], LAYOUTS).get(0) is None
    finally:
        if how == "read-only":
            folder.parent.chmod(0o700)


def test_a_disk_that_fills_up_keeps_nothing(source: Path, folder: Path) -> None:
    """After a failed write, the file is never renamed to its final name, and the .part file is removed."""
    keeping = PackedWeightCache([source], LAYOUTS)
    keeping.put(0, *made()[0])
    assert len(files(folder)) == 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (STARTS[1], limits[1]))
        keeping.put(1, *made()[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    keeping.put(2, *made()[2])
    assert not files(folder)
    assert PackedWeightCache([source], LAYOUTS).get(0) is None


# --- Interruptions ----------------------------------------------------------------------------


def begin(source: Path, *indices: int) -> PackedWeightCache:
    """Put some pieces, and end as if killed: the written data stays, and the lock is released."""
    keeping = PackedWeightCache([source], LAYOUTS)
    for i in indices:
        keeping.put(i, *made()[i])
    assert keeping._writing is not None
    keeping._writing.close()
    return keeping


@pytest.mark.parametrize("finished", [[0], [2], [0, 1], [2, 0]])
def test_finished_pieces_outlive_their_process(source: Path, folder: Path, finished: list[int]) -> None:
    """The next process reuses them and adds the others. The file is the same as without interruption."""
    begin(source, *finished)
    (part,) = files(folder)
    assert part.suffix == ".part"
    keeping = PackedWeightCache([source], LAYOUTS)
    for i, piece in enumerate(made()):
        assert same(keeping.get(i), piece) if i in finished else keeping.get(i) is None
    for i, piece in enumerate(made()):
        keeping.put(i, *(made(seed=1)[i] if i in finished else piece))
    (file,) = files(folder)
    assert file.suffix == ""
    interrupted = file.read_bytes()
    file.unlink()
    keep(source)
    assert file.read_bytes() == interrupted


def test_interrupted_again_and_again(source: Path, folder: Path) -> None:
    """Each process finishes one piece."""
    for i in range(3):
        keeping = PackedWeightCache([source], LAYOUTS)
        assert [keeping.get(j) is not None for j in range(3)] == [j < i for j in range(3)]
        if i < 2:
            begin_again(keeping, i)
        else:
            keeping.put(i, *made()[i])
    back = PackedWeightCache([source], LAYOUTS)
    assert all(same(back.get(i), piece) for i, piece in enumerate(made()))


def begin_again(keeping: PackedWeightCache, i: int) -> None:
    keeping.put(i, *made()[i])
    assert keeping._writing is not None
    keeping._writing.close()


def test_a_piece_without_an_entry_is_not_finished(source: Path, folder: Path) -> None:
    """The process ended after the piece and before its entry. A checksum of 0 is a valid entry."""
    begin(source, 0, 1)
    (part,) = files(folder)
    data = bytearray(part.read_bytes())
    data[8:16] = bytes(8)
    part.write_bytes(data)
    keeping = PackedWeightCache([source], LAYOUTS)
    assert same(keeping.get(0), made()[0])
    assert keeping.get(1) is None
    assert int.from_bytes(data[:8], "little") >> 32 == 1


def test_a_checksum_of_zero_is_an_entry(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zlib.crc32", lambda *_: 0)
    begin(source, 0, 1)
    keeping = PackedWeightCache([source], LAYOUTS)
    assert [keeping.get(i) is not None for i in range(3)] == [True, True, False]


def test_ended_before_it_became_visible(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pieces are finished, so the next process renames the file."""
    with monkeypatch.context() as patch:
        patch.setattr(PackedWeightCache, "_complete", lambda *_: None)
        begin(source, 0, 1, 2)
    keeping = PackedWeightCache([source], LAYOUTS)
    assert all(same(keeping.get(i), piece) for i, piece in enumerate(made()))
    (file,) = files(folder)
    assert file.suffix == ""


@pytest.mark.parametrize("byte", [*range(TABLE), *range(STARTS[0], SIZE, 7)])
def test_damage_in_a_part_file_is_noticed(source: Path, folder: Path, byte: int) -> None:
    """Only the damaged piece is packed again, and the file is completed."""
    begin(source, 0, 2)
    (part,) = files(folder)
    data = bytearray(part.read_bytes())
    data[byte] ^= 1
    part.write_bytes(data)
    damaged = {1, byte // 8 if byte < TABLE else sum(byte >= start for start in STARTS) - 1}
    keeping = PackedWeightCache([source], LAYOUTS)
    for i, piece in enumerate(made()):
        assert keeping.get(i) is None if i in damaged else same(keeping.get(i), piece)
    for i in damaged:
        keeping.put(i, *made()[i])
    back = PackedWeightCache([source], LAYOUTS)
    assert all(same(back.get(i), piece) for i, piece in enumerate(made()))


def others_write(part: Path) -> None:
    part.chmod(0o620)


def part_pipe(part: Path) -> None:
    part.unlink()
    os.mkfifo(part)


def part_folder(part: Path) -> None:
    part.unlink()
    part.mkdir()
    (part / "x").touch()


@pytest.mark.parametrize("spoil", [cut, lengthen, empty, others_write, part_pipe, part_folder])
def test_a_part_file_that_cannot_be_continued_is_replaced(
    source: Path, folder: Path, spoil: Callable[[Path], None]
) -> None:
    """One of another size, one that others could have written, or one that is not a regular file."""
    begin(source, 0, 2)
    (part,) = files(folder)
    spoil(part)
    assert PackedWeightCache([source], LAYOUTS).get(0) is None
    keep(source, made(seed=1))
    (file,) = files(folder)
    back = PackedWeightCache([source], LAYOUTS)
    assert all(same(back.get(i), piece) for i, piece in enumerate(made(seed=1)))
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("spoil", [link, dangling])
def test_a_link_is_not_followed(source: Path, folder: Path, spoil: Callable[[Path], None]) -> None:
    """Its target is neither read nor written, and nothing is cached as long as it exists."""
    begin(source, 0, 2)
    (part,) = files(folder)
    spoil(part)
    target = folder.parent / "elsewhere"
    before = target.read_bytes() if target.exists() else None
    assert PackedWeightCache([source], LAYOUTS).get(0) is None
    keep(source, made(seed=1))
    assert PackedWeightCache([source], LAYOUTS).get(0) is None
    assert (target.read_bytes() if target.exists() else None) == before


def test_a_part_file_of_someone_else_is_not_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(source, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)
        assert PackedWeightCache([source], LAYOUTS).get(0) is None
    assert PackedWeightCache([source], LAYOUTS).get(0) is not None


def test_a_disk_that_fills_up_ends_a_continued_file(source: Path, folder: Path) -> None:
    """Pieces that were already read stay valid."""
    begin(source, 0)
    keeping = PackedWeightCache([source], LAYOUTS)
    back = keeping.get(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (STARTS[1], limits[1]))
        keeping.put(1, *made()[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not files(folder)
    assert same(back, made()[0])
    assert same(keeping.get(0), made()[0])
    assert keeping.get(1) is None


def test_a_part_file_that_is_written_is_left_alone(source: Path, folder: Path) -> None:
    """A second process neither reads it nor caches anything, in any order of events."""
    begin(source, 0)
    first = PackedWeightCache([source], LAYOUTS)
    assert first.get(0) is not None
    second = PackedWeightCache([source], LAYOUTS)
    assert second.get(0) is None
    first.put(1, *made()[1])
    for i, piece in enumerate(made(seed=1)):
        second.put(i, *piece)
    first.put(2, *made()[2])
    back = PackedWeightCache([source], LAYOUTS)
    assert all(same(back.get(i), piece) for i, piece in enumerate(made()))


def test_two_that_find_the_same_damage(source: Path, folder: Path) -> None:
    """One of them repairs the file, the other packs the piece only for itself."""
    keep(source)
    (file,) = files(folder)
    whole = file.read_bytes()
    both = [PackedWeightCache([source], LAYOUTS) for _ in range(2)]
    assert all(keeping.get(0) is not None for keeping in both)
    file.write_bytes(whole[: STARTS[1]] + b"x" + whole[STARTS[1] + 1 :])
    assert [keeping.get(1) for keeping in both] == [None, None]
    for keeping in both:
        keeping.put(1, *made()[1])
        assert same(keeping.get(2), made()[2])
    assert files(folder) == [file]
    assert file.read_bytes() == whole


def test_without_locks_nothing_is_continued(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without file locks, another process could still be writing the .part file, or read a damaged one."""

    def fails(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fails)
    begin(source, 0, 2)
    assert PackedWeightCache([source], LAYOUTS).get(0) is None
    keep(source, made(seed=1))
    back = PackedWeightCache([source], LAYOUTS)
    assert all(same(back.get(i), piece) for i, piece in enumerate(made(seed=1)))
    (file,) = files(folder)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert PackedWeightCache([source], LAYOUTS).get(2) is None
    assert not files(folder)  # the next run writes a complete one


KILLED = """
import os, signal, sys
from pathlib import Path
from llama_scratch.precision.weight_cache import PackedWeightCache
from tests.precision.test_weight_cache import LAYOUTS, made
keeping = PackedWeightCache([Path(sys.argv[1])], LAYOUTS)
for i in (2, 0): keeping.put(i, *made()[i])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_its_finished_pieces(source: Path, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(source)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    keeping = PackedWeightCache([source], LAYOUTS)
    assert same(keeping.get(0), made()[0])
    assert keeping.get(1) is None
    assert same(keeping.get(2), made()[2])


KEEPER = """
import sys, time
from pathlib import Path
from llama_scratch.precision.weight_cache import PackedWeightCache, Layout
from tests.precision.test_weight_cache import LAYOUTS, made
source, ready, go = map(Path, sys.argv[1:])
keeping, pieces = PackedWeightCache([source], LAYOUTS), made()
ready.touch()
while not go.exists(): time.sleep(0.001)
for i, piece in enumerate(pieces): keeping.put(i, *piece)
"""


@pytest.mark.slow
def test_two_programs_that_keep_at_once(source: Path, folder: Path, tmp_path: Path) -> None:
    """Only one writes at a time, and the resulting file is complete."""
    ready, go = [tmp_path / f"ready{i}" for i in range(2)], tmp_path / "go"
    programs = [
        subprocess.Popen([sys.executable, "-c", KEEPER, str(source), str(path), str(go)], cwd=ROOT) for path in ready
    ]
    while not all(path.exists() for path in ready):
        assert all(program.poll() is None for program in programs)
    go.touch()
    assert [program.wait(30) for program in programs] == [0, 0]
    assert len(files(folder)) == 1
    assert same(PackedWeightCache([source], LAYOUTS).get(1), made()[1])


def test_threads_that_keep_at_once(source: Path, folder: Path) -> None:
    """As in packing: one piece each, in any order."""
    layouts: list[Layout] = [(((4, 16), torch.int8), ((4,), torch.float32))] * 40
    pieces = [random_piece((4, 16), torch.Generator().manual_seed(i)) for i in range(40)]
    keeping = PackedWeightCache([source], layouts)
    together = threading.Barrier(4)

    def run(first: int) -> None:
        together.wait()
        for i in range(first, 40, 4):
            keeping.put(i, *pieces[i])

    threads = [threading.Thread(target=run, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files(folder)) == 1
    again = PackedWeightCache([source], layouts)
    assert all(same(again.get(i), piece) for i, piece in enumerate(pieces))


def test_two_of_one_program_leave_a_whole_file_at_least(source: Path, folder: Path) -> None:
    """One of them writes, and pieces of the other are not mixed in."""
    first, second = PackedWeightCache([source], LAYOUTS), PackedWeightCache([source], LAYOUTS)
    for i in range(3):
        first.put(i, *made()[i])
        second.put(i, *made(seed=1)[i])
    back = PackedWeightCache([source], LAYOUTS)
    kept_pieces = [back.get(i) for i in range(3)]
    assert any(
        all(same(piece, expected) for piece, expected in zip(kept_pieces, made(seed), strict=True)) for seed in (0, 1)
    )


# --- A whole model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("kept") / "Tiny")


def answer(directory: Path) -> Tensor:
    """Logits with packed 8-bit weights."""
    llama = Llama.load(directory, precision="int8", device="cpu")
    llama.prepare()
    logits = llama.logits(PROMPT)
    assert llama.predict(PROMPT).model.precision == "int8"
    return logits


def test_the_second_run_quantizes_nothing(model_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are bit-identical, from the same file."""
    first = answer(model_dir)
    (file,) = files(folder)
    before = file.read_bytes()

    def never(*_: object) -> tuple[Tensor, Tensor]:
        raise AssertionError("quantized again")

    monkeypatch.setattr("llama_scratch.precision.packing.to_panels", never)
    assert torch.equal(answer(model_dir), first)
    assert file.read_bytes() == before


def test_a_damaged_file_changes_no_answer(model_dir: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is repaired silently in the background, and complete in the run after the next."""
    first = answer(model_dir)
    capfd.readouterr()
    (file,) = files(folder)
    whole = file.read_bytes()
    for spoiled in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1] + bytes([whole[-1] ^ 128]), whole[:-1], b""):
        file.write_bytes(spoiled)
        assert torch.equal(answer(model_dir), first)
        assert torch.equal(answer(model_dir), first)
        assert files(folder) == [file]
        assert file.read_bytes() == whole
    assert capfd.readouterr() == ("", "")


def test_a_model_that_cannot_be_kept_answers(model_dir: Path, folder: Path) -> None:
    """If the cache folder is a file, or the disk is full."""
    first = answer(model_dir)
    (file,) = files(folder)
    file.unlink()
    folder.rmdir()
    folder.write_bytes(b"")
    assert torch.equal(answer(model_dir), first)
    assert folder.read_bytes() == b""
