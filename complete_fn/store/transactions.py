"""Transactions are repeated after the database was away, for example during its restart."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from complete_fn.errors import CompleteError, StoreLostError

AWAY_SECONDS = 90.0  # how long a database may be away before a waiting transaction fails
P = ParamSpec("P")
T = TypeVar("T")


def retried(method: Callable[P, T]) -> Callable[P, T]:
    """Repeat a method while the database is away. The method must have the same result if it was done already."""

    @functools.wraps(method)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        return repeated(lambda: method(*args, **kwargs), StoreLostError, slept)

    return again


def repeated(work: Callable[[], T], away: type[CompleteError], paused: Callable[[float], bool]) -> T:
    """Do `work` again while it raises `away`, for 90 s at most, with pauses that become longer.

    Args:
        paused: waits so many seconds; False if the caller has no more time.
    """
    until, pause = time.monotonic() + AWAY_SECONDS, 0.02
    while True:
        try:
            return work()
        except away:
            if time.monotonic() > until or not paused(pause * random.uniform(0.5, 1.5)):
                raise
        pause = min(2.0, pause * 2)


def slept(seconds: float) -> bool:
    time.sleep(seconds)
    return True


def insert_into(connection: sa.Connection, table: sa.Table) -> Any:
    """An INSERT that takes ON CONFLICT, in the dialect of the connection's database."""
    return insert_in(connection.dialect.name, table)


def insert_in(dialect: str, table: sa.Table) -> Any:
    return (postgresql if dialect == "postgresql" else sqlite).insert(table)


def upsert(
    connection: sa.Connection,
    table: sa.Table,
    key: Sequence[str],
    rows: list[dict[str, Any]],
    only: Sequence[str] | None = None,
) -> None:
    """Insert rows, which have the same columns. A row with the same key gets all new values, or those of `only`."""
    insert = insert_into(connection, table)
    fresh = {name: insert.excluded[name] for name in (rows[0] if only is None else only) if name not in key}
    if fresh:
        insert = insert.on_conflict_do_update(index_elements=list(key), set_=fresh)
    else:
        insert = insert.on_conflict_do_nothing(index_elements=list(key))
    connection.execute(insert, rows)
