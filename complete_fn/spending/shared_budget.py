"""Processes share a budget through the store, which has its spent and reserved money: a cap holds for all of them.

A run draws money in pieces that cover some rows ahead, and commits spent money together with its slices. Money that it
drew and did not spend is returned when its attempt ends, or is found dead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from complete_fn.engines.prices import nano
from complete_fn.spending.budget import Budget
from complete_fn.store.attempts import Attempt
from complete_fn.store.budget_holds import day_budget
from complete_fn.store.records import money
from complete_fn.store.store import Store
from complete_fn.store.tables import budgets, ledger_hours, summed
from complete_fn.store.transactions import retried, upsert

AHEAD = 32  # rows that one draw covers if enough money is left, so that not every row writes to the store
DAY = 86_400.0
ROUNDING = 2  # in 1e-9 per row, because the lines of a slice are rounded separately from its rows
LONGEST_ROW = 3600.0  # seconds from a row's admission to its commit; a longer row may pass the next day's cap
LOOK_SECONDS = 0.2  # how long a refusal, and the money left, are trusted before the store is read again


@dataclass(frozen=True, slots=True)
class Cap:
    """A bound on a tenant's spending for one `job`, or in each day (UTC) in one `currency`.

    `label` is its name in a refused row's error.
    """

    limit_nano: int
    label: str
    job: str | None = None
    currency: str = ""

    def names(self, now: float) -> set[str]:
        """The budgets in the store that must cover a row which is admitted at the time `now`.

        In a day's last hour the next day's budget must cover it too, as the row is paid when it is committed.
        """
        if self.job is not None:
            return {f"job:{self.job}"}
        return {day_budget(now, self.currency), day_budget(now + LONGEST_ROW, self.currency)}


def day_cap(limit_nano: int, currency: str = "USD") -> Cap:
    return Cap(limit_nano, "The tenant's daily budget", currency=currency)


def job_cap(job: str, limit_nano: int) -> Cap:
    return Cap(limit_nano, "max_cost", job)


class SharedBudget(Budget):
    """Caps that must all cover a row. Each run has its own `Purse`.

    Raises:
        StoreError: The store cannot be read.
    """

    def __init__(self, store: Store, tenant: str, caps: Sequence[Cap]) -> None:
        self.store, self.tenant, self.caps = store, tenant, caps
        self.opened: set[str] = set()  # budgets whose limits in the store this object has brought up to date
        self.open(self.names())

    def names(self) -> dict[str, Cap]:
        """The budgets in the store that must cover a row now, in the order in which they are drawn from."""
        now = self.store.now()
        return dict(sorted((name, cap) for cap in self.caps for name in cap.names(now)))

    @retried
    def open(self, names: Mapping[str, Cap]) -> None:
        """Bring the budgets' limits in the store up to date. A new budget counts what the ledger has already."""
        mine = (budgets.c.tenant == self.tenant) & budgets.c.name.in_(names)
        with self.store.read() as connection:
            known = dict(connection.execute(sa.select(budgets.c.name, budgets.c.limit_nano).where(mine)).all())
        changed = {name: cap for name, cap in names.items() if known.get(name) != cap.limit_nano}
        if changed:
            self.write_limits(changed)
        self.opened |= names.keys()

    def write_limits(self, changed: Mapping[str, Cap]) -> None:
        with self.store.write() as connection:
            for name, cap in changed.items():
                spent = connection.execute(spent_before(self.tenant, name)).scalar_one()
                row = {"tenant": self.tenant, "name": name, "limit_nano": cap.limit_nano}
                fresh = {**row, "spent_nano": int(spent), "reserved_nano": 0}
                upsert(connection, budgets, ("tenant", "name"), [fresh], only=("limit_nano",))

    def for_attempt(self, attempt: Attempt) -> Budget:
        return Purse(self, attempt)


class Purse(Budget):
    """The money that one attempt has drawn. Safe to use from several threads."""

    def __init__(self, shared: SharedBudget, attempt: Attempt) -> None:
        self.shared, self.attempt = shared, attempt
        self.labels: dict[str, str] = {}
        self.lock = threading.Lock()
        self.pocket = 0  # money drawn, but neither reserved for a row nor spent; in 1e-9 of the currency
        self.drawn = False
        self.refused_at, self.refused = -LOOK_SECONDS, 0
        self.seen_at, self.left = -LOOK_SECONDS, (0, 0, "")
        self.follow_day()

    def reserve(self, worst: Decimal) -> bool:
        wanted = nano(worst)
        with self.lock:
            self.follow_day()
            if wanted > self.pocket:
                self.pocket += self.draw(wanted)
            if wanted > self.pocket:
                return False
            self.pocket -= wanted
            return True

    def follow_day(self) -> None:
        """When the budgets of other days count, return what was drawn from those before and is not reserved."""
        names = self.shared.names()
        if tuple(names) == self.attempt.budgets:
            return
        if self.pocket:
            self.shared.store.draw(self.attempt, -self.pocket)
        if not names.keys() <= self.shared.opened:
            self.shared.open(names)
        self.attempt.budgets, self.pocket = tuple(names), 0
        self.labels = {name: cap.label for name, cap in names.items()}

    def draw(self, wanted: int) -> int:
        """Draw money for some rows ahead, or else for this row alone. Returns the amount, or 0 if neither is left."""
        now = time.monotonic()
        if now - self.refused_at < LOOK_SECONDS and wanted >= self.refused:
            return 0
        for more in (wanted * AHEAD, wanted - self.pocket):
            if self.shared.store.draw(self.attempt, more):
                self.drawn = True
                return more
        self.refused_at, self.refused = now, wanted
        return 0

    def can_add(self, more: Decimal) -> bool:
        with self.lock:
            return nano(more) <= self.pocket

    def settle(self, worst: Decimal, actual: Decimal) -> None:
        with self.lock:
            self.pocket += nano(worst) - nano(actual) - ROUNDING
            self.refused_at = -LOOK_SECONDS

    def release(self) -> None:
        """Return all money that was not spent, because other runs may be waiting for it."""
        with self.lock:
            if self.drawn:
                self.shared.store.put_back(self.attempt)
                self.pocket, self.drawn = 0, False

    def hopeless(self, worst: Decimal) -> bool:
        """Whether the row can never fit, even if all money that other runs have reserved came back."""
        return self.tightest()[0] - self.tightest()[1] < nano(worst)

    def tightest(self) -> tuple[int, int, str]:
        """(limit, spent, label) of the cap with the least money left."""
        if time.monotonic() - self.seen_at > LOOK_SECONDS:
            rows = self.shared.store.budgets_of(self.attempt)
            name, limit, spent = min(rows, key=lambda row: row[1] - row[2])
            self.left = limit, spent, self.labels[name]
            self.seen_at = time.monotonic()
        return self.left

    @property
    def limit(self) -> Decimal:  # type: ignore[override]
        return money(self.tightest()[0])

    @property
    def spent(self) -> Decimal:  # type: ignore[override]
        return money(self.tightest()[1])

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.tightest()[2]


def spent_before(tenant: str, budget: str) -> sa.Select[Any]:
    """The money that, by the ledger, was already spent under a budget that is new in the store."""
    c = ledger_hours.c
    total = sa.select(summed(c.cost_nano)).where(c.tenant == tenant)
    kind, _, name = budget.partition(":")
    if kind == "day":
        day, _, currency = name.partition(":")
        start = datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp()
        return total.where(c.hour >= start, c.hour < start + DAY, c.currency == currency)
    return total.where(c.job == name)
