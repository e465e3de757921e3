"""A time limit on a stranger's query that the query itself cannot change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from complete_fn.errors import InputError

AGAIN_SECONDS = 0.5  # a cancellation that reaches the database between two of the query's statements has no effect


class QueryLimit:
    """The seconds that a query may take, from now on; None for no limit.

    A database's own limit (PostgreSQL's `statement_timeout`) is a setting of the session, which a SELECT may change. It
    also holds for each FETCH by itself.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def refuse_late(self) -> None:
        """Raises:
        InputError: The query has taken longer than its limit.
        """
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise InputError(f"The query takes longer than the {self.seconds:g} s that it may.")

    @contextmanager
    def enforced(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Call `cancel` on another thread once the time is over, and again until the block ends.

        Raises:
            InputError: The block failed after the query's time was over.
        """
        ended = threading.Event()

        def watch(seconds: float) -> None:
            while not ended.wait(seconds):
                with suppress(Exception):  # whatever a driver raises: the next try may succeed
                    cancel()
                seconds = AGAIN_SECONDS

        if self.deadline is not None:
            seconds = max(0.0, self.deadline - time.monotonic())
            threading.Thread(target=watch, args=(seconds,), name="query limit", daemon=True).start()
        try:
            yield
        except Exception:
            self.refuse_late()
            raise
        finally:
            ended.set()
