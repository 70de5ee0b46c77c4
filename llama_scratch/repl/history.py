"""The history of typed lines, shared by all sessions and written entry by entry.

The file has prompt_toolkit's format, with the size of each entry in bytes after its timestamp. An entry that was cut
off, because the process was killed or the disk was full, does not match its size and is ignored.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from prompt_toolkit.history import History, InMemoryHistory

from llama_scratch.errors import LlamaScratchError
from llama_scratch.render import text
from llama_scratch.repl.session import Session
from llama_scratch.system.atomic_files import NO_WAIT
from llama_scratch.system.folders import user_folder
from llama_scratch.system.small_files import read_bytes
from llama_scratch.tokenizer import replace_surrogates

_MAX_BYTES = 1 << 26
# A timestamp as prompt_toolkit writes it, an optional size, and for each line of the entry a line that starts with "+".
_ENTRY = re.compile(rb"^# \S+ \S+?(?: (\d+))?\n((?:\+.*\n)+)", re.MULTILINE)


def history_path() -> Path:
    """Return the path of the history file.

    Raises:
        FileNotFoundError: If the user has no home folder.
    """
    return user_folder("state") / "history"


def open_history(session: Session) -> History:
    """Open the history file, which only the user can read.

    If that fails, print a warning and keep the history in memory.
    """
    where = "its file"
    try:
        path = history_path()
        where = str(path)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(_open(path, os.O_RDWR | os.O_CREAT), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(0, "not a regular file")
    except OSError as error:
        session.screen.console.print(
            text.warning(f"The history cannot be saved to {where} ({error.strerror}). It lasts only for this session.")
        )
        return InMemoryHistory()
    return FileHistory(path)


class FileHistory(History):
    """The entries of a history file that several processes share.

    Each entry is appended in one write, so that entries do not interleave. If the file can no longer be written, new
    lines are kept only in memory.
    """

    def __init__(self, path: Path):
        self._path = path
        super().__init__()

    def load_history_strings(self) -> Iterable[str]:
        """Yield the entries of the file, newest first."""
        try:
            data = read_bytes(self._path, _MAX_BYTES, any_content=True)
        except (OSError, LlamaScratchError):
            return
        for size, lines in reversed(_ENTRY.findall(data)):
            if not size or int(size) == len(lines):
                yield "\n".join(line[1:] for line in lines.decode("utf-8", errors="replace").split("\n"))[:-1]

    def store_string(self, string: str) -> None:
        """Append an entry. Lone surrogates are replaced."""
        lines = "".join(f"+{line}\n" for line in replace_surrogates(string).split("\n")).encode()
        with contextlib.suppress(OSError), open(_open(self._path, os.O_WRONLY | os.O_APPEND), "wb", 0) as file:
            file.write(b"\n# %s %d\n%s" % (str(datetime.now()).encode(), len(lines), lines))


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | NO_WAIT, 0o600)
