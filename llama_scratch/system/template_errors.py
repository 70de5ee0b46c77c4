"""Errors of chat templates.

This module has no imports, because the process that runs the template imports it too.
"""

from __future__ import annotations


class RefusalError(Exception):
    """A template rejected the messages with `raise_exception`, and its own message."""


class TemplateError(Exception):
    """A template is broken or exceeds a limit. The message is a clause."""
