"""The listener hands the caller each piece of text as the engine makes it, and keeps what was told of each row."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from complete_fn.planning import BatchPlan
from complete_fn.types import Usage

Tell = Callable[[int, str, Usage], None]  # (row, new piece, tokens so far) on another thread; not of known answers


class Listener:
    """The caller that reads rows while they are computed, or nobody. The engine's threads call it.

    Args:
        tell: the caller's function; None where nobody listens.
    """

    def __init__(self, tell: Tell | None, plan: BatchPlan) -> None:
        self.tell, self.plan = tell, plan
        self.lock = threading.Lock()
        self.told: dict[int, Usage] = {}  # of the rows under way of which the caller has read something
        self.is_silent = False

    def teller(self, number: int) -> Callable[[str, Usage], None] | None:
        """The function that tells the rows of a distinct prompt; None where nobody listens."""
        if self.tell is None:
            return None
        return partial(self.tell_rows, self.tell, number, self.plan.rows_of(number))

    def tell_rows(self, tell: Tell, number: int, rows: list[int], piece: str, usage: Usage) -> None:
        with self.lock:
            if self.is_silent:
                return
            self.told[number] = usage
            for row in rows:
                tell(row, piece, usage)

    def forget(self, number: int) -> None:
        """The prompt's answer is whole: it is billed as that."""
        self.told.pop(number, None)

    def silence(self) -> dict[int, Usage]:
        """Tell nothing more, so that the caller reads nothing unbilled; returns what was told of the rows under way."""
        with self.lock:
            self.is_silent = True
            return dict(self.told)
