"""Errors of chat templates. Has no imports, because the process that runs the template imports it too."""

from __future__ import annotations


class RefusalError(Exception):
    """A template called `raise_exception` to reject the messages. The message is the template's own."""


class TemplateError(Exception):
    """A template is broken or exceeds a limit. The message is a clause."""
