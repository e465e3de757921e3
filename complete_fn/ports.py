"""Ports that callers and settings name are checked here: the system takes a number above 65,535 modulo 65,536.

Without the check, a wrong number would reach another program.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from urllib.parse import urlsplit

LAST_PORT = 65_535
PORTS = f"a port is a whole number from 0 to {LAST_PORT}"


def is_port(port: int | None) -> bool:
    """Whether the number is a port, or none is given."""
    return port is None or 0 <= port <= LAST_PORT


def has_port(url: str) -> bool:
    """Whether the port that the URL names, if any, is a port. A URL that cannot be read at all is refused elsewhere."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return True
    try:
        return is_port(parts.port)
    except ValueError:
        return False


def parse_port(text: str) -> int:
    """The port of a flag, as argparse takes it.

    Raises:
        ArgumentTypeError: The text is no port.
    """
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not is_port(port):
        raise ArgumentTypeError(f"{text!r} is no port; {PORTS}")
    return port
