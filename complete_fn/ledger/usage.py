"""Reports read the ledger: usage by day and model, how a job stopped, which answers are stored, sums for `/metrics`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from complete_fn.ledger.pruning import used_bytes
from complete_fn.ledger.time_span import TimeSpan
from complete_fn.store.job_tables import parts
from complete_fn.store.records import money
from complete_fn.store.rollup import HOUR
from complete_fn.store.store import Store
from complete_fn.store.tables import answers, attempts, ledger, ledger_hours, of_class, summed


class utc_text(FunctionElement[str]):
    """A column with seconds of the epoch as a text in UTC. Parts of a second are cut off: rounding changes days."""

    inherit_cache = True
    type = sa.String()
    in_sqlite, in_postgresql = "", ""


class utc_day(utc_text):
    """Such as "2026-01-31"."""

    inherit_cache = True
    in_sqlite, in_postgresql = "%Y-%m-%d", "YYYY-MM-DD"


class utc_hour(utc_text):
    """Such as "2026-01-31T10:00Z"."""

    inherit_cache = True
    in_sqlite, in_postgresql = "%Y-%m-%dT%H:00Z", 'YYYY-MM-DD"T"HH24:00"Z"'


@compiles(utc_text)
def text_in_sqlite(element: utc_text, compiler: Any, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"strftime('{element.in_sqlite}', CAST({seconds} AS INTEGER), 'unixepoch')"


@compiles(utc_text, "postgresql")
def text_in_postgresql(element: utc_text, compiler: Any, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"to_char(to_timestamp(floor({seconds})) AT TIME ZONE 'UTC', '{element.in_postgresql}')"


# Each makes a group's column from the columns of `TimeSpan.lines`.
GROUPS: dict[str, Callable[[Any], sa.ColumnElement[Any]]] = {
    "hour": lambda c: utc_hour(c.at),
    "day": lambda c: utc_day(c.at),
    "model": lambda c: c.model,
    "query_tag": lambda c: c.query_tag,
    "job": lambda c: c.job,
    "user": lambda c: c.user,
    "tenant": lambda c: c.tenant,
    "engine": lambda c: c.engine,
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
    store: Store,
    by: Sequence[str] = ("day", "model"),
    since: float = 0.0,
    tenant: str | None = None,
    until: float | None = None,
) -> list[UsageLine]:
    """The ledger from `since` on and before `until`, as one line per group, currency and price basis.

    Args:
        since: seconds of the epoch.
        tenant: only lines of this tenant; None takes all lines.
        until: seconds of the epoch; None takes all lines from `since` on.

    Raises:
        InvalidOptionError: An end of the time span is within an hour whose lines are deleted.
    """
    span = TimeSpan(since, until)
    c = span.lines(tenant).c
    groups = [GROUPS[name](c) for name in by]
    split = [*groups, c.currency, c.basis]
    sums = sa.select(
        *split,
        of_class(c.rows, "input", "duplicate", "reused"),
        of_class(c.tokens, "input", "cached_input"),
        of_class(c.tokens, "cached_input"),
        of_class(c.tokens, "output"),
        summed(c.cost_nano),
        of_class(c.saved_nano, "duplicate", "reused"),
        of_class(c.rows, "lost"),
        of_class(c.tokens, "lost"),
        of_class(c.saved_nano, "prefix_cache"),
        of_class(c.device_us, "input"),
        of_class(c.device_us, "idle"),
        of_class(c.device_us, "aborted"),
        of_class(c.saved_us, "duplicate", "reused", "prefix_cache", "swiftkv"),
    )
    with store.read() as connection:
        rows = connection.execute(sums.group_by(*split).order_by(*split)).all()
        span.refuse_deleted(connection)
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
    c = ledger_hours.c
    sums = sa.select(of_class(c.rows, "input"), of_class(c.tokens, "output")).where(
        c.tenant == tenant, c.model == model
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


@dataclass
class LedgerTotals:
    """Sums of all lines so far: rows and tokens by (model, price class), money by (model, currency, price basis)."""

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    nano: Counter[tuple[str, str, str]] = field(default_factory=Counter)


class Totals:
    """Keeps the ledger's sums up to the last hours, and reads the rest anew. Safe to use from several threads.

    An hour is read anew until the ledger has lines that are more than an hour younger. So a line is counted as soon as
    it is committed, and one that is dated still further back in the next hour.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lock = threading.Lock()
        self.until = -1
        self.settled: list[Any] = []

    def ledger(self) -> LedgerTotals:
        hour = ledger_hours.c.hour
        with self.lock, self.store.read() as connection:
            until = (connection.execute(sa.select(sa.func.max(hour))).scalar() or 0) - HOUR
            if until != self.until:
                self.until, self.settled = until, totals_of(connection, hour < until)
            recent = totals_of(connection, hour >= until)
            found = LedgerTotals()
            for model, price_class, currency, basis, rows, tokens, nano in (*self.settled, *recent):
                found.rows[model, price_class] += int(rows)
                found.tokens[model, price_class] += int(tokens)
                found.nano[model, currency, basis] += int(nano)
            return found

    def parts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(parts, tokens) by (model, status), of the parts that are queued or running."""
        p = parts.c
        open_ones = p.status.in_(("queued", "running"))
        sums = sa.select(p.model, p.status, sa.func.count(), summed(p.tokens)).where(open_ones)
        with self.store.read() as connection:
            lines = connection.execute(sums.group_by(p.model, p.status)).all()
        return {(model, status): (int(count), int(tokens)) for model, status, count, tokens in lines}


def totals_of(connection: sa.Connection, which: sa.ColumnElement[bool]) -> list[Any]:
    c = ledger_hours.c
    split = (c.model, c.price_class, c.currency, c.basis)
    sums = sa.select(*split, summed(c.rows), summed(c.tokens), summed(c.cost_nano)).where(which).group_by(*split)
    return list(connection.execute(sums).all())
