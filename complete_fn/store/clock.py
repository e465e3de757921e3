"""A store's clock tells the time of the store's machine, so that hosts whose own clocks differ agree on it.

Leases, pauses, heartbeats, days of budgets and times in the ledger are compared by several hosts. All of them take the
time from here. Times are in seconds of the epoch.
"""

from __future__ import annotations

import time
from typing import Protocol

import sqlalchemy as sa

from complete_fn.logs import logger

LOG = logger("store")
MEASURE_SECONDS = 60.0  # between two comparisons with the database, as a host's timer drifts
ROUGH_SECONDS = 0.5  # a comparison that took longer is too rough
TRIES = 3  # comparisons in a row, of which the quickest counts
TOLERATED_SECONDS = 5.0  # a host's clock that differs more is reported
DIFFERS = (
    "This host's clock is {:.1f} s {} the database's. The service goes by the database's; set this host's right (NTP), "
    "as its logs tell the wrong time."
)


class StoreClock(Protocol):
    def now(self) -> float: ...

    def compare(self, connection: sa.Connection) -> None:
        """Compare this host's clock with the database's, if the last comparison is long ago."""
        ...

    def difference(self) -> str | None:
        """A warning, if this host's own clock differs from the store's by more than `TOLERATED_SECONDS`."""
        ...


class HostClock:
    """The clock of a store that only processes of one machine use: the machine's own."""

    def now(self) -> float:
        return time.time()

    def compare(self, connection: sa.Connection) -> None:
        """Nothing to compare: there is one clock."""

    def difference(self) -> str | None:
        return None


class DatabaseClock:
    """The clock of a database server: its time at the last comparison, and what has elapsed on this host since.

    Safe to use from several threads. Comparing twice at a time does no harm.
    """

    def __init__(self) -> None:
        self.epoch: float | None = None  # the database's time at the zero of `elapsed`
        self.due = 0.0
        self.told = False

    def now(self) -> float:
        return time.time() if self.epoch is None else self.epoch + elapsed()

    def difference(self) -> str | None:
        ahead = time.time() - self.now()
        if abs(ahead) <= TOLERATED_SECONDS:
            return None
        return DIFFERS.format(abs(ahead), "ahead of" if ahead > 0 else "behind")

    def compare(self, connection: sa.Connection) -> None:
        if elapsed() < self.due:
            return
        tried = [once(connection) for _ in range(TRIES if self.epoch is None else 1)]
        took, epoch = min(tried)
        if took < ROUGH_SECONDS or self.epoch is None:
            self.epoch = epoch
            self.due = elapsed() + (MEASURE_SECONDS if took < ROUGH_SECONDS else 0.0)
            self.report()

    def report(self) -> None:
        """Log a clock that differs, once until it is right again."""
        differs = self.difference()
        if differs and not self.told:
            LOG.warning(differs)
        self.told = differs is not None


def once(connection: sa.Connection) -> tuple[float, float]:
    """(seconds that the comparison took, the database's time at the zero of `elapsed`)."""
    asked = elapsed()
    told = float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
    took = elapsed() - asked
    return took, told - asked - took / 2


def elapsed() -> float:
    """Seconds on a timer that nobody sets. On Linux it counts the time of a suspended machine too."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)
