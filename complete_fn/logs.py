"""Logs of errors that name no prompt: the type and the place only."""

from __future__ import annotations

import logging
import traceback

LOG = logging.getLogger("complete_fn.service")


def log(what: str, error: Exception) -> None:
    """The type and place of an error; its message may quote a prompt."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    LOG.error("%s: %s at %s:%s", what, type(error).__name__, last.name, last.lineno)
