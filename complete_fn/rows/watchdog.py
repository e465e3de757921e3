"""A time limit on a stranger's query that the query itself cannot change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from complete_fn.errors import InputError
from complete_fn.interrupts import GONE, end_if_abandoned

LOOK_SECONDS = 0.1  # between two looks whether the query must end
AGAIN_SECONDS = 0.5  # a cancellation that reaches the database between two of the query's statements has no effect


class QueryLimit:
    """The seconds that a query may take, from now on; None for no limit.

    A database's own limit (PostgreSQL's `statement_timeout`) is a setting of the session, which a SELECT may change. It
    also holds for each FETCH by itself.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.deadline = None if seconds is None else time.monotonic() + seconds

    @property
    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def refuse_late(self) -> None:
        """Raises:
        InputError: The query has taken longer than its limit.
        """
        if self.is_late:
            raise InputError(f"The query takes longer than the {self.seconds:g} s that it may.")

    @contextmanager
    def enforced(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Call `cancel` on another thread once the time is over or nobody waits for the rows, and again until the end.

        Raises:
            InputError: The block failed after the query's time was over.
            Abandoned: It failed after nobody waited for the rows any more.
        """
        ended, gone = threading.Event(), GONE.get()

        def watch() -> None:
            while not ended.wait(LOOK_SECONDS):
                if self.is_late or (gone is not None and gone.is_set()):
                    with suppress(Exception):  # whatever a driver raises: the next try may succeed
                        cancel()
                    ended.wait(AGAIN_SECONDS)

        if self.deadline is not None or gone is not None:
            threading.Thread(target=watch, name="query limit", daemon=True).start()
        try:
            yield
        except Exception:
            end_if_abandoned()
            self.refuse_late()
            raise
        finally:
            ended.set()
