"""Why a chat template gives no conversation. Imports nothing: the process that runs the template needs it too."""

from __future__ import annotations


class RefusalError(Exception):
    """Raised by a template, through `raise_exception`, for messages that it does not accept; the reason is its own."""


class TemplateError(Exception):
    """A template is broken or exceeds a limit; the reason is a clause."""
