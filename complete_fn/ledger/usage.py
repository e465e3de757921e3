"""Reports read the ledger: usage by day and model, how a job stopped, which answers are stored, sums for `/metrics`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from complete_fn.ledger.pruning import used_bytes
from complete_fn.store.job_tables import parts
from complete_fn.store.records import money
from complete_fn.store.store import Store
from complete_fn.store.tables import answers, attempts, ledger, of_class, summed


class utc_day(FunctionElement[str]):
    """The UTC day, such as "2026-01-31", of a column with seconds of the epoch."""

    inherit_cache = True
    type = sa.String()


@compiles(utc_day)
def day_in_sqlite(element: utc_day, compiler: Any, **options: Any) -> str:
    return f"strftime('%Y-%m-%d', {compiler.process(element.clauses, **options)}, 'unixepoch')"


@compiles(utc_day, "postgresql")
def day_in_postgresql(element: utc_day, compiler: Any, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"to_char(to_timestamp({seconds}) AT TIME ZONE 'UTC', 'YYYY-MM-DD')"


GROUPS: dict[str, sa.ColumnElement[Any]] = {
    "day": utc_day(ledger.c.at),
    "model": ledger.c.model,
    "query_tag": ledger.c.query_tag,
    "job": ledger.c.job,
    "user": ledger.c.user,
    "tenant": ledger.c.tenant,
    "engine": ledger.c.engine,
}


@dataclass(frozen=True, slots=True)
class UsageLine:
    """One group of the ledger.

    `rows` counts rows with answers: computed, copied from an equal row, or reused. `cost` is billed. `saved` is what
    copied and reused rows would have cost. `lost_rows` and `lost_tokens` (estimated) are work of stopped attempts, not
    billed. `cache_saved` is what the prefix cache saved. `device_seconds` is the rows' part of the engines' time, if
    the engines meter it. `idle_seconds` and `aborted_seconds` are the rest of that time, which belongs to no tenant.
    `saved_seconds` is what copied and reused rows, cached tokens and SwiftKV's skipped layers would have taken.
    """

    group: tuple[str, ...]
    rows: int
    input: int
    cached: int
    output: int
    cost: Decimal
    saved: Decimal
    currency: str
    basis: str
    lost_rows: int
    lost_tokens: int
    cache_saved: Decimal
    device_seconds: float
    idle_seconds: float
    aborted_seconds: float
    saved_seconds: float


def usage(
    store: Store, by: Sequence[str] = ("day", "model"), since: float = 0.0, tenant: str | None = None
) -> list[UsageLine]:
    """The ledger from `since` (seconds of the epoch) on, as one line per group, currency and price basis.

    Args:
        tenant: only lines of this tenant; None takes all lines.
    """
    groups = [GROUPS[name] for name in by]
    split = [*groups, ledger.c.currency, ledger.c.basis]
    sums = sa.select(
        *split,
        of_class(ledger.c.rows, "input", "duplicate", "reused"),
        of_class(ledger.c.tokens, "input", "cached_input"),
        of_class(ledger.c.tokens, "cached_input"),
        of_class(ledger.c.tokens, "output"),
        summed(ledger.c.cost_nano),
        of_class(ledger.c.saved_nano, "duplicate", "reused"),
        of_class(ledger.c.rows, "lost"),
        of_class(ledger.c.tokens, "lost"),
        of_class(ledger.c.saved_nano, "prefix_cache"),
        of_class(ledger.c.device_us, "input"),
        of_class(ledger.c.device_us, "idle"),
        of_class(ledger.c.device_us, "aborted"),
        of_class(ledger.c.saved_us, "duplicate", "reused", "prefix_cache", "swiftkv"),
    )
    chosen = ledger.c.at >= since
    if tenant is not None:
        chosen = chosen & (ledger.c.tenant == tenant)
    with store.read() as connection:
        rows = connection.execute(sums.where(chosen).group_by(*split).order_by(*split)).all()
    return [usage_line(row, len(groups)) for row in rows]


def usage_line(row: Sequence[Any], groups: int) -> UsageLine:
    currency, basis, rows, prompt, cached, output, cost, saved, lost_rows, lost_tokens, spared, *times = row[groups:]
    device, idle, aborted, spared_time = (int(time) / 1e6 for time in times)
    return UsageLine(
        group=tuple(str(value) if value is not None else "-" for value in row[:groups]),
        rows=rows,
        input=prompt,
        cached=cached,
        output=output,
        cost=money(cost),
        saved=money(saved),
        currency=currency,
        basis=basis,
        lost_rows=lost_rows,
        lost_tokens=lost_tokens,
        cache_saved=money(spared),
        device_seconds=device,
        idle_seconds=idle,
        aborted_seconds=aborted,
        saved_seconds=spared_time,
    )


STOPS = {"lost": "killed", "cancelled": "interrupted", "failed": "stopped by an error"}


@dataclass(frozen=True, slots=True)
class StoppedAttempt:
    """How the last attempt of an unfinished job ended, with the rows and tokens it admitted and did not commit."""

    status: str
    rows: int
    tokens: int

    def line(self) -> str:
        how = f"The last attempt was {STOPS[self.status]}"
        if not self.rows:
            return f"{how} with nothing uncommitted."
        return f"{how} with at most {self.rows:,} rows, about {self.tokens:,} tokens, uncommitted: not billed."


def last_stop(store: Store, tenant: str, job: str) -> StoppedAttempt | None:
    """How the job's last attempt stopped; None if the job has no unfinished attempt, or if the last one was done."""
    of_job = (attempts.c.tenant == tenant) & (attempts.c.job == job) & attempts.c.status.notin_(("ended", "running"))
    last = sa.select(attempts.c.id, attempts.c.status).where(of_job).order_by(attempts.c.id.desc()).limit(1)
    with store.read() as connection:
        found = connection.execute(last).first()
        if found is None or found.status not in STOPS:
            return None
        lost = sa.select(summed(ledger.c.rows), summed(ledger.c.tokens)).where(
            ledger.c.attempt == found.id, ledger.c.price_class == "lost"
        )
        rows, tokens = connection.execute(lost).one()
    return StoppedAttempt(found.status, rows or 0, tokens or 0)


def committed_rows(store: Store, tenant: str, job: str) -> int:
    """Rows that the attempts of an unfinished job have computed, including copies of equal rows."""
    mine, _ = store.unfinished(tenant, job)
    lines = sa.select(summed(ledger.c.rows)).where(
        ledger.c.attempt.in_(list(mine)), ledger.c.price_class.in_(("input", "duplicate"))
    )
    with store.read() as connection:
        return connection.execute(lines).scalar() or 0


def tokens_used(store: Store, tenant: str, job: str) -> int:
    """Billed tokens of prompts and answers of an unfinished job's attempts."""
    mine, _ = store.unfinished(tenant, job)
    billed = ledger.c.price_class.in_(("input", "cached_input", "output"))
    tokens = sa.select(summed(ledger.c.tokens)).where(ledger.c.attempt.in_(list(mine)), billed)
    with store.read() as connection:
        return int(connection.execute(tokens).scalar() or 0)


def mean_output(store: Store, model: str, tenant: str) -> float | None:
    """Output tokens per row that the model computed for the tenant; None with fewer than 20 rows in the ledger."""
    sums = sa.select(of_class(ledger.c.rows, "input"), of_class(ledger.c.tokens, "output")).where(
        ledger.c.tenant == tenant, ledger.c.model == model
    )
    with store.read() as connection:
        rows, tokens = connection.execute(sums).one()
    return tokens / rows if rows and rows >= 20 else None


@dataclass(frozen=True, slots=True)
class StoredAnswers:
    """Counts of the stored answers. `for_jobs`: those kept only for an unfinished job. `bytes`: in use in the file."""

    count: int
    for_jobs: int
    bytes: int
    oldest: float | None
    newest: float | None
    models: dict[str, int] = field(default_factory=dict)


def stored(store: Store) -> StoredAnswers:
    sums = sa.select(
        sa.func.count(),
        sa.func.count(answers.c.job),
        sa.func.min(answers.c.created_at),
        sa.func.max(answers.c.created_at),
    )
    by_model = sa.select(answers.c.model, sa.func.count()).group_by(answers.c.model).order_by(answers.c.model)
    with store.read() as connection:
        count, for_jobs, oldest, newest = connection.execute(sums).one()
        models = {row[0]: row[1] for row in connection.execute(by_model)}
    return StoredAnswers(count, for_jobs, used_bytes(store), oldest, newest, models)


SETTLED_SECONDS = 5.0  # a line is committed within this time after its `at`, so older lines are complete


@dataclass
class LedgerTotals:
    """Sums of all lines so far: rows and tokens by (model, price class), money by (model, currency, price basis)."""

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    nano: Counter[tuple[str, str, str]] = field(default_factory=Counter)


class Totals:
    """Keeps the ledger's sums and reads only new lines. Safe to use from several threads."""

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
            until = self.store.now() - SETTLED_SECONDS
            with self.store.read() as connection:
                lines = connection.execute(sums.where(c.at > self.until, c.at <= until)).all()
            self.until = max(self.until, until)
            for model, price_class, currency, basis, rows, tokens, nano in lines:
                self.found.rows[model, price_class] += int(rows)
                self.found.tokens[model, price_class] += int(tokens)
                self.found.nano[model, currency, basis] += int(nano)
            return self.found

    def parts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(parts, tokens) by (model, status), of the parts that are queued or running."""
        p = parts.c
        open_ones = p.status.in_(("queued", "running"))
        sums = sa.select(p.model, p.status, sa.func.count(), summed(p.tokens)).where(open_ones)
        with self.store.read() as connection:
            lines = connection.execute(sums.group_by(p.model, p.status)).all()
        return {(model, status): (int(count), int(tokens)) for model, status, count, tokens in lines}
