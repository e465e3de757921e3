"""One progress bar for a query that a query engine runs in pieces."""

from __future__ import annotations

import threading
from decimal import Decimal

from complete_fn.progress import Bar
from complete_fn.types import Usage

PAUSE = 0.5  # seconds without a piece, after which the query counts as over


class QueryBar:
    """A bar whose total grows with each piece, as the query engine does not say how many rows are still to come.

    Safe to call from several threads: their pieces share the bar.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.lock = threading.Lock()
        self.running = 0
        self.bar: Bar | None = None
        self.timer: threading.Timer | None = None

    def start(self, rows: int) -> None:
        with self.lock:
            self.running += 1
            if self.timer is not None:
                self.timer.cancel()
            if self.bar is None:
                self.bar = Bar(self.label)
            self.bar.start(rows)

    def advance(self, rows: int, usage: Usage, cost: Decimal, currency: str) -> None:
        with self.lock:
            if self.bar is not None:
                self.bar.advance(rows, usage, cost, currency)

    def stop(self) -> None:
        with self.lock:
            self.running -= 1
            if self.running == 0:
                self.timer = threading.Timer(PAUSE, self.end)
                self.timer.daemon = True
                self.timer.start()

    def end(self) -> None:
        with self.lock:
            if self.running == 0 and self.bar is not None:
                self.bar.stop()
                self.bar = None
