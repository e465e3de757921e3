"""What a failure says, and to whom: the log has no word of a prompt, a tenant reads nothing of the operator's."""

from __future__ import annotations

import logging
import secrets
import traceback

from complete_fn.errors import CompleteError
from complete_fn.types import Asker


def log_failure(what: str, error: BaseException, room: str = "service") -> None:
    """Log the type and place of an error to the logger of a room. The error's message may quote a prompt."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    logger(room).error("%s: %s at %s:%s", what, type(error).__name__, last.name, last.lineno)


def for_tenant(what: str, error: CompleteError, tenant: str) -> CompleteError:
    """The error as the tenant may read it. Of a fault that is the operator's, it has a number that the log has too.

    The local tenant, as whom everybody asks where no API key was made, is the operator and reads the message itself.
    """
    if error.is_public or tenant == Asker().tenant:
        return error
    number = secrets.token_hex(4)
    logger("service").error("%s: fault %s: %s", what, number, str(error).splitlines()[0])
    kind = (type(error).__doc__ or "").splitlines()[0].strip()
    return type(error)(f"{kind} The service's log says more of fault {number}.").for_everybody()


def printable(text: str, kept: str = "") -> str:
    """The text with escapes in place of control characters, which could rewrite what a terminal or a log shows.

    Args:
        kept: characters that stay although they are control characters.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


class PrintableLines(logging.Filter):
    """Makes each message one line of printable text: paths, headers and names come from strangers."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), None
        return True


ONE_LINE = PrintableLines()


def logger(room: str) -> logging.Logger:
    """The logger of a room. All our log lines are made by these, whoever has set up the handlers."""
    found = logging.getLogger(f"complete_fn.{room}")
    found.addFilter(ONE_LINE)  # once: a filter that is there already is not added again
    return found
