"""What the state tells a person: use by day and model, how a job stopped, what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from complete_fn.bounds import used_bytes
from complete_fn.ledger import money
from complete_fn.store import Store
from complete_fn.tables import answers, attempts, ledger

GROUPS: dict[str, sa.ColumnElement[Any]] = {
    "day": sa.func.strftime("%Y-%m-%d", ledger.c.at, "unixepoch", "localtime"),
    "model": ledger.c.model,
    "query_tag": ledger.c.query_tag,
    "user": ledger.c.user,
}


@dataclass(frozen=True, slots=True)
class UsageLine:
    """One group of the ledger.

    `rows` have answers: computed, copied from an equal row, or reused. `cost` is billed; `saved` is what copied and
    reused rows would have cost; `lost_rows` and `lost_tokens` (estimated) are work of stopped attempts, not billed.
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


def usage(
    store: Store, by: Sequence[str] = ("day", "model"), since: float = 0.0, tenant: str | None = None
) -> list[UsageLine]:
    """The ledger from `since` (seconds of the epoch) on, one line per group, currency and price basis.

    Args:
        tenant: only its lines; None takes all.
    """
    groups = [GROUPS[name] for name in by]
    split = [*groups, ledger.c.currency, ledger.c.basis]
    sums = sa.select(
        *split,
        summed(ledger.c.rows, "input", "duplicate", "reused"),
        summed(ledger.c.tokens, "input", "cached_input"),
        summed(ledger.c.tokens, "cached_input"),
        summed(ledger.c.tokens, "output"),
        sa.func.sum(ledger.c.cost_nano),
        summed(ledger.c.saved_nano, "duplicate", "reused"),
        summed(ledger.c.rows, "lost"),
        summed(ledger.c.tokens, "lost"),
    )
    chosen = ledger.c.at >= since
    if tenant is not None:
        chosen = chosen & (ledger.c.tenant == tenant)
    with store.read() as connection:
        rows = connection.execute(sums.where(chosen).group_by(*split).order_by(*split)).all()
    return [usage_line(row, len(groups)) for row in rows]


def summed(column: sa.Column[Any], *price_classes: str) -> sa.ColumnElement[Any]:
    return sa.func.sum(sa.case((ledger.c.price_class.in_(price_classes), column), else_=0))


def usage_line(row: Sequence[Any], groups: int) -> UsageLine:
    currency, basis, rows, prompt, cached, output, cost, saved, lost_rows, lost_tokens = row[groups:]
    group = tuple(str(value) if value is not None else "-" for value in row[:groups])
    return UsageLine(
        group, rows, prompt, cached, output, money(cost), money(saved), currency, basis, lost_rows, lost_tokens
    )


STOPS = {"lost": "killed", "cancelled": "interrupted", "failed": "stopped by an error"}


@dataclass(frozen=True, slots=True)
class Stop:
    """How the last attempt of an unfinished job ended, with what it had admitted and not committed."""

    status: str
    rows: int
    tokens: int

    def line(self) -> str:
        how = f"The last attempt was {STOPS[self.status]}"
        if not self.rows:
            return f"{how} with nothing uncommitted."
        return f"{how} with at most {self.rows:,} rows, about {self.tokens:,} tokens, uncommitted: not billed."


def last_stop(store: Store, tenant: str, job: str) -> Stop | None:
    """None if the job has no unfinished attempt, or its last one came to its end."""
    of_job = (attempts.c.tenant == tenant) & (attempts.c.job == job) & attempts.c.status.notin_(("ended", "running"))
    last = sa.select(attempts.c.id, attempts.c.status).where(of_job).order_by(attempts.c.id.desc()).limit(1)
    with store.read() as connection:
        found = connection.execute(last).first()
        if found is None or found.status not in STOPS:
            return None
        lost = sa.select(sa.func.sum(ledger.c.rows), sa.func.sum(ledger.c.tokens)).where(
            ledger.c.attempt == found.id, ledger.c.price_class == "lost"
        )
        rows, tokens = connection.execute(lost).one()
    return Stop(found.status, rows or 0, tokens or 0)


def committed_rows(store: Store, tenant: str, job: str) -> int:
    """Rows that the unfinished attempts of a job have computed, copies of equal rows included."""
    mine, _ = store.unfinished(tenant, job)
    lines = sa.select(sa.func.sum(ledger.c.rows)).where(
        ledger.c.attempt.in_(list(mine)), ledger.c.price_class.in_(("input", "duplicate"))
    )
    with store.read() as connection:
        return connection.execute(lines).scalar() or 0


def mean_output(store: Store, model: str) -> float | None:
    """Output tokens per computed row of the model so far; None if the ledger has fewer than 20 rows of it."""
    sums = sa.select(summed(ledger.c.rows, "input"), summed(ledger.c.tokens, "output")).where(ledger.c.model == model)
    with store.read() as connection:
        rows, tokens = connection.execute(sums).one()
    return tokens / rows if rows and rows >= 20 else None


@dataclass(frozen=True, slots=True)
class Stored:
    """The answers of the state: `bytes` is what the file holds, `for_jobs` those kept for an unfinished job only."""

    count: int
    for_jobs: int
    bytes: int
    oldest: float | None
    newest: float | None
    models: dict[str, int] = field(default_factory=dict)


def stored(store: Store) -> Stored:
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
    return Stored(count, for_jobs, used_bytes(store), oldest, newest, models)
