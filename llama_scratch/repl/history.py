"""What was typed in this and earlier sessions, written entry by entry as it is sent.

The format is prompt_toolkit's, with the bytes of an entry behind its time: one that a killed program or a full disk
left in pieces is known by that, and is none.
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
# A time, as prompt_toolkit writes it, and a line with "+" for each line of the entry.
_ENTRY = re.compile(rb"^# \S+ \S+?(?: (\d+))?\n((?:\+.*\n)+)", re.MULTILINE)


def history_path() -> Path:
    """Where the history is kept. Raises FileNotFoundError where there is no home."""
    return user_folder("state") / "history"


def open_history(session: Session) -> History:
    """The history file, for oneself alone; where it cannot be kept the session says so and goes on without."""
    where = "its file"
    try:
        path = history_path()
        where = str(path)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(_open(path, os.O_RDWR | os.O_CREAT), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(0, "it is no file")
    except OSError as error:
        session.screen.console.print(
            text.warning(f"The history cannot be kept in {where} ({error.strerror}), so it ends with this session.")
        )
        return InMemoryHistory()
    return FileHistory(path)


class FileHistory(History):
    """The entries of a file that several programs share.

    Each is appended by one write, so that they do not mix. A file that cannot be written any more ends the keeping,
    not the session: the lines stay in memory.
    """

    def __init__(self, path: Path):
        self._path = path
        super().__init__()

    def load_history_strings(self) -> Iterable[str]:
        """The newest first."""
        try:
            data = read_bytes(self._path, _MAX_BYTES, any_content=True)
        except (OSError, LlamaScratchError):
            return
        for size, lines in reversed(_ENTRY.findall(data)):
            if not size or int(size) == len(lines):
                yield "\n".join(line[1:] for line in lines.decode("utf-8", errors="replace").split("\n"))[:-1]

    def store_string(self, string: str) -> None:
        """A line that a terminal pasted with broken characters is kept in whole ones."""
        lines = "".join(f"+{line}\n" for line in replace_surrogates(string).split("\n")).encode()
        with contextlib.suppress(OSError), open(_open(self._path, os.O_WRONLY | os.O_APPEND), "wb", 0) as file:
            file.write(b"\n# %s %d\n%s" % (str(datetime.now()).encode(), len(lines), lines))


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | NO_WAIT, 0o600)
