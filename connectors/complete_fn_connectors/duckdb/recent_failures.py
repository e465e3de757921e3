"""A failed constant call raises the same failure again for a second, as DuckDB may drop what a call raises.

DuckDB evaluates a call whose arguments are all constant while it plans. If the call fails, DuckDB mostly drops the
exception and evaluates the call again, at the latest when the query runs. Without this memory, DuckDB would start an
engine that cannot start a dozen times and pay a row that fails under `strict` as often, and Ctrl-C would not end the
query. Only calls of one row are remembered, because a constant call has one row.
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
        """Raise the error that an equal call, or one of the same model, has raised within the last second."""
        with self.lock:
            if not self.failures:
                return
            now = self.clock()
            self.failures = {k: (at, e) for k, (at, e) in self.failures.items() if now - at < SECONDS}
            for key in ((), *failure_keys(name, columns)):
                if key in self.failures:
                    raise self.failures[key][1]

    def note(self, name: str, columns: tuple[Any, ...], error: BaseException) -> None:
        """Remember the failure of a call of one row.

        An interrupt is raised again for all calls, an engine's failure for all calls of its model, a failed row for
        equal calls. Wrong requests are not remembered, because they cost nothing when they fail again.
        """
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
    """(key of all calls of the model, key of equal calls), from the first row of a call."""
    values = tuple(str(column[0]) if len(column) else "" for column in columns)
    return values[:1], (name, *values)
