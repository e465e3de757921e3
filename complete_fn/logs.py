"""Logs of failures without a word of a prompt: the error's type and place only."""

from __future__ import annotations

import logging
import traceback


def log_failure(what: str, error: BaseException, room: str = "service") -> None:
    """Log the type and place of an error to the logger of a room. The error's message may quote a prompt."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    logger = logging.getLogger(f"complete_fn.{room}")
    logger.error("%s: %s at %s:%s", what, type(error).__name__, last.name, last.lineno)
