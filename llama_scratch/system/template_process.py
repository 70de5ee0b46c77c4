"""The process that runs an untrusted chat template.

The process is started once, reused, and killed if it exceeds its limits. It runs `template_sandbox.py` in a new Python
interpreter, not in a fork, so it does not inherit threads or open files.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_scratch.errors import LlamaScratchError
from llama_scratch.system.processes import end_group
from llama_scratch.system.template_errors import RefusalError, TemplateError

# Maximum seconds to compile and render a template. Published templates take milliseconds.
MAX_SECONDS = 1.0
# Maximum seconds to start the process. Enough for a busy machine with a slow disk.
START_SECONDS = 30.0
# Maximum bytes per answer: `template_sandbox.MAX_SIZE` characters, each up to six bytes in JSON (\u0000).
MAX_ANSWER = 32 << 20

_PACKAGES = Path(__file__).parents[2]  # the folder that contains this package
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from llama_scratch.system.template_sandbox import main; main()"
# Environment variables that the process inherits. Python may need them to start if it is in an unusual place.
_ENVIRONMENT = ("TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")
_OUT_OF_MEMORY = 3  # `template_sandbox.OUT_OF_MEMORY`


class TemplateProcess:
    """Runs templates in one process, which ends with this object. Thread-safe.

    The first request starts the process. If a request is interrupted, the process is killed, and the next request
    starts a new one.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def render(
        self, source: str, special: list[str], messages: list[dict[str, str]], variables: dict[str, Any]
    ) -> list[str]:
        """Render a conversation, and split it at the template's special tokens.

        Args:
            source: The template.
            special: The names of the vocabulary's special tokens.
            messages: The conversation, each message with its role and content.
            variables: Further variables of the template.

        Returns:
            Plain text and names of special tokens, alternating, beginning and ending with plain text.

        Raises:
            RefusalError: If the template does not accept the messages.
            TemplateError: If the template fails or exceeds a limit.
            LlamaScratchError: If the process cannot be started.
        """
        if os.getpid() != self._owner:  # after a fork, the process belongs to the parent
            TemplateProcess.__init__(self)
        request = {
            "source": source,
            "special": special,
            "messages": messages,
            "variables": variables,
            "seconds": MAX_SECONDS,
        }
        line = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            try:
                answer = self._answer(line)
            except BaseException:
                self._end()
                raise
        match answer:
            case {"pieces": [*pieces]} if all(isinstance(piece, str) for piece in pieces):
                return pieces
            case {"refused": str(reason)}:
                raise RefusalError(reason)
            case {"failed": str(reason)}:
                raise TemplateError(reason)
        raise TemplateError("its answer is not valid")

    def close(self) -> None:
        """End the process. The next request starts it again."""
        with self._lock:
            self._end()

    def _answer(self, request: bytes) -> Any:
        process = self._started()
        with _deadline(process, MAX_SECONDS) as late:
            answer = _ask(process, request)
        if late.is_set() or not answer.endswith(b"\n"):
            self._end()
        if not answer.endswith(b"\n"):
            raise TemplateError(_reason(process.returncode, late=late.is_set(), answered=len(answer)))
        try:
            return json.loads(answer.decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):  # a template that escaped from the sandbox could write anything
            return None

    def _started(self) -> subprocess.Popen[bytes]:
        """Start the process if necessary, and wait until it is ready."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        paths = [*map(os.path.abspath, sys.path), str(_PACKAGES)]
        try:
            process = self._process = subprocess.Popen(
                [sys.executable or "", "-I", "-S", "-X", "utf8", "-c", _PROGRAM, *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                cwd=os.path.abspath(os.sep),
                start_new_session=True,  # Ctrl-C only reaches the parent, which then kills the child
            )
        except OSError as error:
            raise LlamaScratchError(
                f"The process for the model's chat template cannot be started ({error.strerror}). Try again, or use "
                "the model without chat."
            ) from error
        self._finalizer = weakref.finalize(self, _end, process, self._owner)
        with _deadline(process, START_SECONDS):
            ready = _ask(process, b"")
        if ready != b"ready\n":
            raise LlamaScratchError(
                "The process for the model's chat template does not start. Check that this Python can import jinja2, "
                "or use the model without chat."
            )
        return process

    def _end(self) -> None:
        if self._process is not None:
            self._process = None
            self._finalizer()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        end_group(process)
    for pipe in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(OSError):  # the rest of the buffer has no reader
            pipe.close()


def _ask(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """Write a request, if any, and read one line.

    The line is incomplete if the process ends or writes too much.
    """
    assert process.stdin
    assert process.stdout
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(request)
        process.stdin.flush()
    return process.stdout.readline(MAX_ANSWER)


@contextlib.contextmanager
def _deadline(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill a process that takes too long. Yields an event that is then set.

    Works on any operating system, unlike the process's own time limit.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        end_group(process)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        timer.join()


def _reason(code: int, *, late: bool, answered: int) -> str:
    """Return the reason why a process did not answer, as a clause."""
    if answered:
        return "it writes too much"
    if late or (hasattr(signal, "SIGALRM") and code == -signal.SIGALRM):
        return f"it does not end within {MAX_SECONDS:g} s"
    if code == _OUT_OF_MEMORY:
        return "it needs too much memory"
    return f"it ended its process with {code}"
