"""What the store says of all tenants together, for monitoring: sums of the ledger, parts by status."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import sqlalchemy as sa

from complete_fn.store.job_tables import parts
from complete_fn.store.store import Store
from complete_fn.store.tables import ledger, summed

SETTLED_SECONDS = 5.0  # a line is committed within so long of its time


@dataclass
class LedgerTotals:
    """Sums of all lines so far: rows and tokens by (model, price class), money by (model, currency, price basis)."""

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    nano: Counter[tuple[str, str, str]] = field(default_factory=Counter)


class Totals:
    """Keeps the sums and reads only the lines that are new. Safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lock = threading.Lock()
        self.until = 0.0
        self.found = LedgerTotals()

    def ledger(self) -> LedgerTotals:
        c = ledger.c
        split = (c.model, c.price_class, c.currency, c.basis)
        sums = sa.select(*split, summed(c.rows), summed(c.tokens), summed(c.cost_nano)).group_by(*split)
        with self.lock:
            until = time.time() - SETTLED_SECONDS
            with self.store.read() as connection:
                lines = connection.execute(sums.where(c.at > self.until, c.at <= until)).all()
            self.until = max(self.until, until)
            for model, price_class, currency, basis, rows, tokens, nano in lines:
                self.found.rows[model, price_class] += int(rows)
                self.found.tokens[model, price_class] += int(tokens)
                self.found.nano[model, currency, basis] += int(nano)
            return self.found

    def parts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(parts, tokens) by (model, status) of the parts that are not over."""
        p = parts.c
        open_ones = p.status.in_(("queued", "running"))
        sums = sa.select(p.model, p.status, sa.func.count(), summed(p.tokens)).where(open_ones)
        with self.store.read() as connection:
            lines = connection.execute(sums.group_by(p.model, p.status)).all()
        return {(model, status): (int(count), int(tokens)) for model, status, count, tokens in lines}
