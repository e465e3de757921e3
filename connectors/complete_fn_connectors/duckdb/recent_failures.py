"""A failed constant call raises the same failure again for a second, as DuckDB may drop what a call raises.

DuckDB evaluates a call whose arguments are all constant while it plans, and in most places takes an exception as a sign
to try again later, at the latest when the query runs. Without memory an engine that cannot start would be started a
dozen times, a row that fails under `strict` paid as often, and Ctrl-C end nothing. So a failure of a call of one row
(folding makes no other) is raised again where the same would be tried within a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from complete_fn.errors import RequestError, RowFailedError

SECONDS = 1.0  # DuckDB tries again within milliseconds; a person, or a loop that waits between attempts, takes longer
Key = tuple[Any, ...]


class RecentFailures:
    """The failures of one registration. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self.failures: dict[Key, tuple[float, BaseException]] = {}

    def raise_again(self, name: str, columns: tuple[Any, ...]) -> None:
        """Raise what a call like this one has raised within the last second."""
        with self.lock:
            if not self.failures:
                return
            now = self.clock()
            self.failures = {k: (at, e) for k, (at, e) in self.failures.items() if now - at < SECONDS}
            for key in ((), *failure_keys(name, columns)):
                if key in self.failures:
                    raise self.failures[key][1]

    def note(self, name: str, columns: tuple[Any, ...], error: BaseException) -> None:
        """Keep a failure of a call of one row. An interrupt concerns all calls, an engine's failure all of its model, a
        failed row its call; a wrong request costs nothing to meet again."""
        if len(columns[0]) != 1:
            return
        model, call = failure_keys(name, columns)
        if isinstance(error, RowFailedError):
            key: Key = call
        elif isinstance(error, RequestError):
            return
        else:
            key = () if isinstance(error, KeyboardInterrupt) else model
        with self.lock:
            self.failures[key] = (self.clock(), error)


def failure_keys(name: str, columns: tuple[Any, ...]) -> tuple[Key, Key]:
    """(what all calls of its model have in common, what the same call has), by a call's first row."""
    values = tuple(str(column[0]) if len(column) else "" for column in columns)
    return values[:1], (name, *values)
