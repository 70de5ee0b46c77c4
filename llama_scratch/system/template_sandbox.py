"""Render conversations with the untrusted chat template of a model file.

This module runs in a child process, which `system/template_process.py` starts, supervises and kills. There are two
layers of protection:

1. Jinja's sandbox blocks access to Python's internals and changes of the input.
2. The process has memory and time limits. It cannot open files or connections, or start processes.

Forbidding operations cannot bound the cost of a template: a few nested loops, one comparison of two nested lists or one
wide number format can exceed any limit. Therefore this process does all work that depends on the file, and it is killed
if it exceeds its limits.

Requests arrive on standard input and answers go to standard output, one JSON object per line. This module only
imports Jinja, the standard library and `template_errors`, so the process starts in about 60 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llama_scratch.system.template_errors import RefusalError

# Maximum characters of an answer (several times the longest context), and maximum special tokens in it.
MAX_SIZE = 4_000_000
MAX_SPECIAL = 100_000
# Maximum bytes of writable memory. Code and libraries take about 10 MB more.
MAX_MEMORY = 128 << 20
# Exit code if a template needs more memory.
OUT_OF_MEMORY = 3
READY = b"ready\n"


class TooMuchError(Exception):
    """The answer exceeds a limit."""


# --- The process ------------------------------------------------------------------------------


def main() -> None:
    """Answer requests until standard input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _warm_up()
    limit_process()
    answers.write(READY)
    answers.flush()
    try:
        for line in requests:
            request = json.loads(line.decode("utf-8", "surrogatepass"))
            # The time limit still applies if the supervising process has ended.
            _alarm(request.pop("seconds"))
            answer = answer_to(**request)
            _alarm(0)
            answers.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            answers.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _warm_up() -> None:
    """Import all modules that Python and Jinja import on first use.

    Later, this process cannot open files.
    """
    sandbox = _Sandbox()
    context = sandbox.from_string("").new_context()
    for call, names in ((sandbox.call_filter, sandbox.filters), (sandbox.call_test, sandbox.tests)):
        for name in names:
            with contextlib.suppress(Exception):
                call(name, "", context=context)
    with contextlib.suppress(ZeroDivisionError):
        sandbox.from_string("{{ strftime_now('%x') }}{{ 1 / 0 }}").render()


def limit_process() -> None:
    """Apply the limits to this process."""
    try:
        import resource
    except ImportError:  # Windows: only the supervisor limits the time
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limits = {"DATA": MAX_MEMORY, "STACK": 8 << 20, "NOFILE": 3, "NPROC": 0, "FSIZE": 0, "CORE": 0}
    for name, limit in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not supported on every system
            number = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(number)[1]
            lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(number, (lower, lower))


def _alarm(seconds: float) -> None:
    """Let the system kill this process after some time, even during an operation.

    0 seconds cancels this.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def answer_to(
    source: str, special: list[str], messages: list[dict[str, str]], variables: dict[str, Any]
) -> dict[str, Any]:
    """Answer a request with the rendered pieces, or with the reason for a failure.

    Args:
        source: The template.
        special: The names of the vocabulary's special tokens.
        messages: The conversation, each message with its role and content.
        variables: Further variables of the template.

    Returns:
        {"pieces": [plain, special, plain, …]}, {"refused": reason} or {"failed": reason}.
    """
    try:
        return {"pieces": pieces(source, tuple(special), messages, variables)}
    except RefusalError as error:
        return {"refused": _reason(error)}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a template can raise anything
        return {"failed": _reason(error)}


def _reason(error: Exception) -> str:
    return str(error)[:1000] or type(error).__name__


# --- Templates --------------------------------------------------------------------------------


def pieces(
    source: str, special: tuple[str, ...], messages: list[dict[str, str]], variables: dict[str, Any]
) -> list[str]:
    """Render a conversation, and split it at the template's own special tokens.

    While the template runs, each special token's name in a message is replaced by a character that no message
    contains. All names in the output are therefore the template's own.

    Args:
        source: The template.
        special: The names of the vocabulary's special tokens.
        messages: The conversation, each message with its role and content.
        variables: Further variables of the template.

    Returns:
        Plain text and names of special tokens, alternating, beginning and ending with plain text.

    Raises:
        RefusalError: If the template does not accept the messages.
        TooMuchError: If the result is too long.
        Exception: Any error that the template raises.
    """
    names = _names(special)
    typed = "".join(message["content"] for message in messages)
    unused = (char for char in map(chr, range(0xF0000, 0x110000)) if char not in typed)
    stand_ins = {name: next(unused) for name in set(names.findall(typed))}
    marked = [
        message | {"content": names.sub(lambda match: stand_ins[match[0]], message["content"])} for message in messages
    ]
    text = _template(source).render(messages=marked, **variables)
    if len(text) > MAX_SIZE:
        raise TooMuchError(f"it writes more than {MAX_SIZE:,} characters")
    parts = names.split(text, maxsplit=MAX_SPECIAL)
    if len(parts) > 2 * MAX_SPECIAL:
        raise TooMuchError(f"it writes {MAX_SPECIAL:,} special tokens or more")
    typed_again = {ord(char): name for name, char in stand_ins.items()}
    parts = [part.translate(typed_again) for part in parts]
    if sum(map(len, parts)) > MAX_SIZE:
        raise TooMuchError(f"it writes more than {MAX_SIZE:,} characters")
    return parts


@lru_cache(maxsize=1)
def _names(special: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")  # (?!) never matches


@lru_cache(maxsize=4)
def _template(source: str) -> Template:
    return _Sandbox().from_string(source)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, extended like the one that transformers uses for chat templates.

    Source: `_cached_compile_jinja_template` in transformers, utils/chat_template_utils.py.
    """

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]


class _Generation(Extension):
    """The tag `{% generation %}`, which has no effect here.

    In training, it marks the text of the assistant.
    """

    tags = {"generation"}  # noqa: RUF012 - as in Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse the content between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A namespace that rejects names with a leading underscore, such as `__class__`."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it stores a value under the name {name}")


def _raise_exception(message: object) -> None:
    raise RefusalError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Convert to JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
