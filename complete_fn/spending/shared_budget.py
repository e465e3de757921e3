"""Processes share a budget through the store, which has its spent and reserved money: a cap holds for all of them.

A run draws money in pieces that cover some rows ahead, and commits spent money together with its slices. Money that it
drew and did not spend is returned when its attempt ends, or is found dead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from complete_fn.engines.prices import nano
from complete_fn.spending.budget import Budget
from complete_fn.store.attempts import Attempt
from complete_fn.store.records import money
from complete_fn.store.store import Store
from complete_fn.store.tables import attempts, budgets, ledger, summed
from complete_fn.store.transactions import retried, upsert

AHEAD = 32  # rows that one draw covers if enough money is left, so that not every row writes to the store
ROUNDING = 2  # in 1e-9 per row, because the lines of a slice are rounded separately from its rows
LOOK_SECONDS = 0.2  # how long a refusal, and the money left, are trusted before the store is read again


@dataclass(frozen=True, slots=True)
class Cap:
    """A bound on a tenant's spending. `name` is its key in the store, `label` its name in a refused row's error."""

    name: str
    limit_nano: int
    label: str


def day_cap(limit_nano: int) -> Cap:
    return Cap(f"day:{datetime.now(UTC).date()}", limit_nano, "The tenant's daily budget")


def job_cap(job: str, limit_nano: int) -> Cap:
    return Cap(f"job:{job}", limit_nano, "max_cost")


class SharedBudget(Budget):
    """Caps that must all cover a row. Each run has its own `Purse`.

    Raises:
        StoreError: The store cannot be read.
    """

    def __init__(self, store: Store, tenant: str, caps: Sequence[Cap]) -> None:
        self.store, self.tenant, self.caps = store, tenant, sorted(caps, key=lambda c: c.name)
        self.open()

    @retried
    def open(self) -> None:
        mine = (budgets.c.tenant == self.tenant) & budgets.c.name.in_([c.name for c in self.caps])
        with self.store.read() as connection:
            known = dict(connection.execute(sa.select(budgets.c.name, budgets.c.limit_nano).where(mine)).all())
        changed = [c for c in self.caps if known.get(c.name) != c.limit_nano]
        if not changed:
            return
        with self.store.write() as connection:
            for cap in changed:
                spent = connection.execute(spent_before(self.tenant, cap)).scalar_one()
                row = {"tenant": self.tenant, "name": cap.name, "limit_nano": cap.limit_nano}
                fresh = {**row, "spent_nano": int(spent), "reserved_nano": 0}
                upsert(connection, budgets, ("tenant", "name"), [fresh], only=("limit_nano",))

    def for_attempt(self, attempt: Attempt) -> Budget:
        return Purse(self, attempt)


class Purse(Budget):
    """The money that one attempt has drawn. Safe to use from several threads."""

    def __init__(self, shared: SharedBudget, attempt: Attempt) -> None:
        self.shared, self.attempt = shared, attempt
        attempt.budgets = tuple(c.name for c in shared.caps)
        self.lock = threading.Lock()
        self.pocket = 0  # money drawn, but neither reserved for a row nor spent; in 1e-9 of the currency
        self.drawn = False
        self.refused_at, self.refused = -LOOK_SECONDS, 0
        self.seen_at, self.left = -LOOK_SECONDS, (0, 0, "")

    def reserve(self, worst: Decimal) -> bool:
        wanted = nano(worst)
        with self.lock:
            if wanted > self.pocket:
                self.pocket += self.draw(wanted)
            if wanted > self.pocket:
                return False
            self.pocket -= wanted
            return True

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
            labels = {c.name: c.label for c in self.shared.caps}
            self.left = min(((limit, spent, labels[name]) for name, limit, spent in rows), key=lambda r: r[0] - r[1])
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


def spent_before(tenant: str, cap: Cap) -> sa.Select[Any]:
    """The money that, by the ledger, was already spent under a cap that is new in the store."""
    total = sa.select(summed(ledger.c.cost_nano)).where(ledger.c.tenant == tenant)
    kind, _, name = cap.name.partition(":")
    if kind == "day":
        return total.where(ledger.c.at >= datetime.fromisoformat(f"{name}T00:00:00+00:00").timestamp())
    of_job = (attempts.c.job >= f"{name}/") & (attempts.c.job < f"{name}0")  # "0" follows "/"
    return total.where(ledger.c.attempt.in_(sa.select(attempts.c.id).where(of_job)))
