"""`main` is the command `complete-fn`. It looks a verb up in `registry.VERBS` and imports it only when it is used."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from complete_fn import __version__
from complete_fn.cli.terminal import print_err
from complete_fn.errors import CompleteError, InvalidOptionError
from complete_fn.registry import VERBS, resolve

ESCAPE = "CSV: an apostrophe before text that a spreadsheet would run as a formula (=, +, -, @)"
OK, FAULT, SOME_FAILED, INTERRUPTED = 0, 1, 3, 130


class Parser(argparse.ArgumentParser):
    """A parser whose errors are query faults: one line, exit code 1."""

    def error(self, message: str) -> NoReturn:
        raise InvalidOptionError(f"{message} (`{self.prog} --help` shows what there is).")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0: all rows have answers. 3: some rows failed. 1: a query fault, told on stderr. 130: interrupted.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = show_warning
    try:
        refuse_bytes(given)
        return run_verb(given)
    except CompleteError as error:
        print_err(f"complete-fn: {error}")
        return FAULT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's flush at exit does not fail
        return FAULT


def refuse_bytes(given: list[str]) -> None:
    """Raises:
    InvalidOptionError: An argument has bytes that are not UTF-8, which no state, model or file name takes.
    """
    for text in given:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidOptionError(
                f"The argument {text!r} has bytes that are not UTF-8. Write it in UTF-8."
            ) from error


def run_verb(given: list[str]) -> int:
    verbs = "\n".join(f"  {name:14}{verb.what}" for name, verb in VERBS.items())
    parser = Parser(
        prog="complete-fn",
        usage="complete-fn VERB ...",
        description="COMPLETE(model, prompt) for tables.",
        epilog=f"verbs:\n{verbs}\n\n`complete-fn VERB --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"complete-fn {__version__}")
    parser.add_argument("verb", nargs="?", choices=list(VERBS), metavar="VERB", help=argparse.SUPPRESS)
    try:
        verb = parser.parse_args(given[:1]).verb
        if verb is None:
            parser.print_help()
            return OK
        return int(resolve(VERBS[verb].target)(given[1:]) or OK)
    except SystemExit as leaving:  # argparse's: 0 after --help, 2 after an error
        return FAULT if leaving.code else OK


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our own warnings as one line. Warnings of libraries are dropped, because users cannot act on them."""
    if category.__module__.startswith("complete_fn"):
        print_err(f"complete-fn: warning: {message}")


def add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home", metavar="DIR", help="folder of answers and ledger (default: COMPLETE_FN_HOME, else the user's data)"
    )


def parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """The options of `--option` pairs `k=v`: a value is JSON if it can be read as JSON, else text.

    Raises:
        InvalidOptionError: One of them has no `=`.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise InvalidOptionError(f"--option {pair!r} is not of the form name=value.")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found
