"""All text that the shell prints for a person goes through here: no name in it can steer the terminal."""

from __future__ import annotations

import sys

from complete_fn.logs import printable


def print_out(text: str, end: str = "\n") -> None:
    """Print to stdout. Line ends and tabs stay, because our own texts have them."""
    print(printable(text, "\n\t"), end=end)


def print_err(text: str) -> None:
    print(printable(text, "\n\t"), file=sys.stderr)
