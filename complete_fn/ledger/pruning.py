"""Bounds of the stored answers, by age and by size. The ledger is never touched."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import sqlalchemy as sa

from complete_fn.store.store import Store
from complete_fn.store.tables import answers, attempts, budgets, upkeep

HOUR, DAY, GIB = 3600.0, 86_400.0, 2.0**30
JOB_DAYS = 30.0  # an unfinished job can be resumed for so long
CHUNK = 2_000  # answers that go in one transaction


def prune(store: Store, gib: float, days: float, now: float | None = None) -> int:
    """Delete answers older than `days`, then the oldest until the file is below `gib`; returns how many went.

    Does nothing within an hour of the last time. Answers that an unfinished job keeps for its resume stay 30 days.
    """
    now = time.time() if now is None else now
    if not due(store, now):
        return 0
    gone = delete(store, expendable(now) & (answers.c.created_at < now - days * DAY))
    if used_bytes(store) > gib * GIB:
        gone += shrink(store, gib, now)
    forget_attempts(store, now)
    give_back(store)
    return gone


def clear(store: Store, model: str | None = None, before: float | None = None) -> int:
    """Delete answers, those kept for unfinished jobs too: of one model, or made before a time, or all."""
    which = sa.true() if model is None else answers.c.model == model
    if before is not None:
        which = which & (answers.c.created_at < before)
    gone = delete(store, which)
    give_back(store)
    return gone


def due(store: Store, now: float) -> bool:
    """Whether upkeep is due; if so it counts as done from here on, so that no second process does it too."""
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


def expendable(now: float) -> sa.ColumnElement[bool]:
    return answers.c.job.is_(None) | (answers.c.created_at < now - JOB_DAYS * DAY)


def shrink(store: Store, gib: float, now: float) -> int:
    """To nine tenths of the bound, so that not every session has to."""
    gone = 0
    while (excess := used_bytes(store) - 0.9 * gib * GIB) > 0:
        chunk = delete(store, expendable(now) & (answers.c.created_at <= last_of(store, excess, now)))
        if not chunk:
            break
        gone += chunk
    return gone


def last_of(store: Store, excess: float, now: float) -> float:
    """When the newest of the oldest answers was made that have `excess` bytes together."""
    before = sa.func.sum(answers.c.bytes).over(order_by=(answers.c.created_at, answers.c.id)) - answers.c.bytes
    oldest = sa.select(answers.c.created_at, before.label("before")).where(expendable(now)).subquery()
    newest = sa.select(sa.func.max(oldest.c.created_at)).where(oldest.c.before < excess)
    with store.read() as connection:
        return float(connection.execute(newest).scalar() or 0.0)


def delete(store: Store, which: sa.ColumnElement[bool]) -> int:
    """Delete the answers that match, oldest first, chunk by chunk so that other writers get their turn."""
    gone = 0
    while True:
        oldest = sa.select(answers.c.id).where(which).order_by(answers.c.created_at).limit(CHUNK)
        with store.write() as connection:
            chunk = connection.execute(answers.delete().where(answers.c.id.in_(oldest))).rowcount
        gone += chunk
        if chunk < CHUNK:
            return gone


def used_bytes(store: Store) -> int:
    """Bytes of the SQLite file that hold something; in PostgreSQL those of the stored answers."""
    with store.read() as connection:
        return store.database.used_bytes(connection)


def forget_attempts(store: Store, now: float) -> None:
    """Attempts and days that are over are of no more use; the ledger has what they did."""
    over = (attempts.c.status != "running") & (attempts.c.began < now - JOB_DAYS * DAY)
    days_over = budgets.c.name.like("day:%") & (
        budgets.c.name < f"day:{datetime.fromtimestamp(now - 2 * DAY, UTC).date()}"
    )
    with store.write() as connection:
        connection.execute(attempts.delete().where(over))
        connection.execute(budgets.delete().where(days_over))


def give_back(store: Store) -> None:
    """Hand empty space back to the file system, a little at a time."""
    while True:
        with store.write() as connection:
            if not store.database.give_back(connection):
                return
