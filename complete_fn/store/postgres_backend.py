"""A PostgreSQL database holds the store of a service with many processes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from complete_fn.errors import StoreError, StoreLostError
from complete_fn.registry import missing
from complete_fn.store.backends import cause, masked
from complete_fn.store.clock import DatabaseClock, StoreClock


class PostgresBackend:
    """A database of a PostgreSQL server, 15 or newer, at READ COMMITTED."""

    def __init__(self, url: sa.URL) -> None:
        self.place = masked(url)
        self.clock: StoreClock = DatabaseClock()
        self.writing = nullcontext()
        try:
            self.engine = sa.create_engine(
                url.set(drivername="postgresql+psycopg"),
                pool_pre_ping=True,  # notices a restarted server before the transaction begins, not within it
                pool_size=8,
                max_overflow=24,
                connect_args={"connect_timeout": 10, "application_name": "complete-fn"},
            )
        except ModuleNotFoundError as error:
            raise missing("psycopg") from error

        @sa.event.listens_for(self.engine, "connect")
        def connected(connection: Any, _: Any) -> None:
            # 60 s: a worker that is suspended within a transaction must not hold its locks for ever.
            connection.execute("SET idle_in_transaction_session_timeout = 60000")
            connection.commit()

    def fault(self, error: Exception) -> StoreError:
        text = cause(error).replace(self.engine.url.password or "\0", "***")
        what = f"The database {self.place} cannot be used: {text.strip().splitlines()[0]}."
        return StoreLostError(f"{what} Is it running?") if transient(error) else StoreError(what)

    def lock_schema(self, connection: sa.Connection) -> None:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({0x636F6D70})")

    def used_bytes(self, connection: sa.Connection) -> int:
        """Bytes of the stored answers, without the space that PostgreSQL keeps for later use."""
        return int(connection.exec_driver_sql("SELECT coalesce(sum(bytes), 0) FROM answers").scalar_one())

    def give_back(self, connection: sa.Connection) -> bool:
        """Nothing to do: autovacuum returns the space."""
        return False

    def after_fork(self) -> None:
        self.engine.dispose(close=False)


# In this order: serialization failure, deadlock, the server shuts down, it crashed, it starts, too many connections,
# the session's time limit. `transient` adds class 08: the connection broke.
TRANSIENT = ("40001", "40P01", "57P01", "57P02", "57P03", "53300", "25P03")


def transient(error: Exception) -> bool:
    """Whether the same transaction may succeed if it is repeated."""
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return state in TRANSIENT or state.startswith("08")
    lost = type(error.orig).__name__ in ("OperationalError", "InterfaceError")
    return error.connection_invalidated or (lost and "authentication failed" not in str(error.orig))
