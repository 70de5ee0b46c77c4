"""Errors of chat templates.

This module has no imports, because the process that runs the template imports it too.
"""

from __future__ import annotations


class RefusalError(Exception):
    """A template rejected the messages by calling `raise_exception`.

    The message is that of the template.
    """


class TemplateError(Exception):
    """A template is broken or exceeds a limit.

    The message is a clause such as "it writes too much".
    """
