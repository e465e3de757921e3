"""Pruning bounds the stored answers by age and size, and the ledger's lines by age. The sums by hour stay for ever."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa

from complete_fn.ledger.time_span import LINES_FROM, lines_from
from complete_fn.store.rollup import hour_of
from complete_fn.store.store import Store
from complete_fn.store.tables import answers, attempts, budgets, ledger, upkeep
from complete_fn.store.transactions import upsert

HOUR, DAY, GIB = 3600.0, 86_400.0, 2.0**30
JOB_DAYS = 30.0  # days for which an unfinished job can be resumed
CHUNK = 2_000  # answers or lines deleted in one transaction, so that other writers get their turn
LINES_AT_ONCE = 20_000  # lines of the ledger that one round of upkeep deletes, so that its other tasks are not late


def prune(store: Store, gib: float, days: float) -> int:
    """Delete answers older than `days`, then the oldest answers until the file is below `gib`. Returns their number.

    Does nothing within an hour after the last pruning. Answers kept for an unfinished job's resume stay 30 days.
    """
    now = store.now()
    if not due(store, now):
        return 0
    gone = delete(store, expendable(now) & (answers.c.created_at < now - days * DAY))
    if used_bytes(store) > gib * GIB:
        gone += shrink(store, gib, now)
    forget_attempts(store, now)
    give_back(store)
    return gone


def clear(store: Store, model: str | None = None, before: float | None = None) -> int:
    """Delete all answers, or those of one model or made before a time, including those kept for unfinished jobs."""
    which = sa.true() if model is None else answers.c.model == model
    if before is not None:
        which = which & (answers.c.created_at < before)
    gone = delete(store, which)
    give_back(store)
    return gone


def due(store: Store, now: float) -> bool:
    """Whether upkeep is due. If so it counts as done at once, so that no second process does it too."""
    recent = sa.select(upkeep.c.at).where(upkeep.c.name == "prune", upkeep.c.at > now - HOUR)
    with store.read() as connection:
        if connection.execute(recent).first() is not None:
            return False
    with store.write() as connection:
        if connection.execute(recent).first() is not None:
            return False
        connection.execute(upkeep.delete())
        connection.execute(upkeep.insert().values(name="prune", at=now))
    return True


def prune_ledger(store: Store, days: float, now: float) -> int:
    """Delete the ledger's lines of the hours that were over `days` ago, at most LINES_AT_ONCE. Returns their number."""
    before = hour_of(now - days * DAY)
    gone = 0
    while gone < LINES_AT_ONCE and (chunk := delete_lines(store, before)):
        gone += chunk
    return gone


def delete_lines(store: Store, before: int) -> int:
    old = sa.select(ledger.c.id).where(ledger.c.at < before).order_by(ledger.c.at).limit(CHUNK)
    with store.read() as connection:
        if connection.execute(old.limit(1)).first() is None:
            return 0
    with store.write() as connection:
        if lines_from(connection) < before:
            upsert(connection, upkeep, ("name",), [{"name": LINES_FROM, "at": before}])
        mine = old.with_for_update(skip_locked=True)  # other processes of the service delete lines too
        return connection.execute(ledger.delete().where(ledger.c.id.in_(mine))).rowcount


def expendable(now: float) -> sa.ColumnElement[bool]:
    return answers.c.job.is_(None) | (answers.c.created_at < now - JOB_DAYS * DAY)


def shrink(store: Store, gib: float, now: float) -> int:
    """Delete the oldest answers down to nine tenths of the bound, so that the next sessions need not do it again."""
    gone = 0
    while (excess := used_bytes(store) - 0.9 * gib * GIB) > 0:
        chunk = delete(store, expendable(now) & (answers.c.created_at <= last_of(store, excess, now)))
        if not chunk:
            break
        gone += chunk
    return gone


def last_of(store: Store, excess: float, now: float) -> float:
    """The time up to which the oldest answers together have `excess` bytes."""
    before = sa.func.sum(answers.c.bytes).over(order_by=(answers.c.created_at, answers.c.id)) - answers.c.bytes
    oldest = sa.select(answers.c.created_at, before.label("before")).where(expendable(now)).subquery()
    newest = sa.select(sa.func.max(oldest.c.created_at)).where(oldest.c.before < excess)
    with store.read() as connection:
        return float(connection.execute(newest).scalar() or 0.0)


def delete(store: Store, which: sa.ColumnElement[bool]) -> int:
    """Delete the matching answers, oldest first. Returns their number."""
    gone = 0
    while True:
        oldest = sa.select(answers.c.id).where(which).order_by(answers.c.created_at).limit(CHUNK)
        with store.write() as connection:
            chunk = connection.execute(answers.delete().where(answers.c.id.in_(oldest))).rowcount
        gone += chunk
        if chunk < CHUNK:
            return gone


def used_bytes(store: Store) -> int:
    """Bytes in use: in SQLite of the file's pages, in PostgreSQL of the stored answers."""
    with store.read() as connection:
        return store.database.used_bytes(connection)


def forget_attempts(store: Store, now: float) -> None:
    """Delete attempts and daily budgets that are over. The ledger keeps what they used."""
    over = (attempts.c.status != "running") & (attempts.c.began < now - JOB_DAYS * DAY)
    days_over = budgets.c.name.like("day:%") & (
        budgets.c.name < f"day:{datetime.fromtimestamp(now - 2 * DAY, UTC).date()}"
    )
    with store.write() as connection:
        connection.execute(attempts.delete().where(over))
        connection.execute(budgets.delete().where(days_over))


def give_back(store: Store) -> None:
    """Return empty space to the file system, a little in each transaction."""
    while True:
        with store.write() as connection:
            if not store.database.give_back(connection):
                return
