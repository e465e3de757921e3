"""The two databases a store can be in: one SQLite file for a machine, PostgreSQL for a service of many processes."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from complete_fn.errors import StoreBusyError, StoreError, StoreLostError
from complete_fn.host import filesystem_of
from complete_fn.registry import missing

BUSY_SECONDS = 30
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "fuse.sshfs", "lustre", "ceph", "glusterfs")
REMEDY = "Point COMPLETE_FN_HOME at a folder on a local disk that you may write to."
BROKEN = (
    "Move the file away: the next run begins a new one (`sqlite3 FILE .recover` shows what can be read of this one)."
)
REMEDIES = {
    "full": "Free some space: what was committed is safe, run again to go on.",
    "No space": "Free some space: what was committed is safe, run again to go on.",
    "malformed": BROKEN,
    "not a database": BROKEN,
}
URLS = "It must be the path of a file or postgresql://USER:PASSWORD@HOST:PORT/DATABASE."
PAGES = 4_096  # of SQLite, given back to the file system in one transaction


class StoreBackend(Protocol):
    """`place` is its name for people: without a password."""

    place: str
    engine: sa.Engine

    @property
    def writing(self) -> AbstractContextManager[Any]:
        """Held while this process writes."""
        ...

    def fault(self, error: Exception) -> StoreError: ...

    def lock_schema(self, connection: sa.Connection) -> None:
        """Until the transaction ends, no other process changes the schema."""
        ...

    def used_bytes(self, connection: sa.Connection) -> int: ...

    def give_back(self, connection: sa.Connection) -> bool:
        """Return some of the empty space to the file system; whether there may be more."""
        ...

    def after_fork(self) -> None: ...


class SqliteBackend:
    """One file with mode 0600, write-ahead log, one writer at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, str(path)
        self.writing = threading.Lock()  # our threads take turns at once; SQLite's busy wait sleeps up to 100 ms
        refuse_network(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            make_private(path)
        except OSError as error:
            raise self.fault(error) from error
        self.engine = sqlite_engine(path)

    def fault(self, error: Exception) -> StoreError:
        text = cause(error)
        if "locked" in text or "busy" in text:
            return StoreBusyError(f"Another process holds {self.place} since {BUSY_SECONDS} s; try again.")
        remedy = next((r for mark, r in REMEDIES.items() if mark in text), REMEDY)
        return StoreError(f"The state file {self.place} cannot be used: {text}. {remedy}")

    def lock_schema(self, connection: sa.Connection) -> None:
        """BEGIN IMMEDIATE has done it."""

    def used_bytes(self, connection: sa.Connection) -> int:
        """Bytes of the file that hold something."""
        pages, empty, size = (
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - empty) * size)

    def give_back(self, connection: sa.Connection) -> bool:
        before = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
        if not before:
            return False
        cursor = connection.connection.cursor()
        cursor.execute(f"PRAGMA incremental_vacuum({PAGES})")
        cursor.fetchall()  # each step frees one page
        return bool(connection.exec_driver_sql("PRAGMA freelist_count").scalar_one() < before)

    def after_fork(self) -> None:
        """A forked child opens connections of its own: SQLite's must not be shared."""
        self.writing = threading.Lock()
        self.engine.dispose(close=False)


class PostgresBackend:
    """A database of a PostgreSQL server, 15 or newer, at READ COMMITTED."""

    def __init__(self, url: sa.URL) -> None:
        self.place = masked(url)
        self.writing = nullcontext()
        try:
            self.engine = sa.create_engine(
                url.set(drivername="postgresql+psycopg"),
                pool_pre_ping=True,  # a restarted server is noticed before the transaction, not in it
                pool_size=8,
                max_overflow=24,
                connect_args={"connect_timeout": 10, "application_name": "complete-fn"},
            )
        except ModuleNotFoundError as error:
            raise missing("psycopg") from error

        @sa.event.listens_for(self.engine, "connect")
        def connected(connection: Any, _: Any) -> None:
            # A worker that is stopped in the middle of a transaction must not hold its locks for ever.
            connection.execute("SET idle_in_transaction_session_timeout = 60000")
            connection.commit()

    def fault(self, error: Exception) -> StoreError:
        text = cause(error).replace(self.engine.url.password or "\0", "***")
        what = f"The database {self.place} cannot be used: {text.strip().splitlines()[0]}."
        return StoreLostError(f"{what} Is it running?") if transient(error) else StoreError(what)

    def lock_schema(self, connection: sa.Connection) -> None:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({0x636F6D70})")

    def used_bytes(self, connection: sa.Connection) -> int:
        """Bytes of the stored answers; what PostgreSQL keeps for later use is not counted."""
        return int(connection.exec_driver_sql("SELECT coalesce(sum(bytes), 0) FROM answers").scalar_one())

    def give_back(self, connection: sa.Connection) -> bool:
        """Autovacuum does it."""
        return False

    def after_fork(self) -> None:
        self.engine.dispose(close=False)


def open_database(url_or_path: str | Path) -> StoreBackend:
    """Raises:
    StoreError: it names neither a file nor a database that is supported.
    """
    if isinstance(url_or_path, Path) or "://" not in url_or_path:
        return SqliteBackend(Path(url_or_path))
    try:
        url = sa.make_url(url_or_path)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"The database URL cannot be read. {URLS}") from error
    kind = url.get_backend_name()
    if kind == "sqlite" and url.database:
        return SqliteBackend(Path(url.database))
    if kind not in ("postgresql", "postgres"):
        raise StoreError(f"The database {masked(url)} cannot be used. {URLS}")
    try:
        return PostgresBackend(url)
    except (ArgumentError, NoSuchModuleError, TypeError) as error:
        raise StoreError(f"The database {masked(url)} cannot be used. {URLS}") from error


def masked(url: sa.URL) -> str:
    """The URL without its password, also where it is given as a parameter."""
    secret = {name: "..." for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(secret).render_as_string(hide_password=True)


def cause(error: Exception) -> str:
    return str(error.orig if isinstance(error, DBAPIError) else error)


# PostgreSQL: serialization failure, deadlock; the server goes down, has crashed, starts; too many connections; a
# session ended by its time limit. Class 08: the connection broke.
TRANSIENT = ("40001", "40P01", "57P01", "57P02", "57P03", "53300", "25P03")


def transient(error: Exception) -> bool:
    """Whether the same transaction may well succeed when it is made again."""
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return state in TRANSIENT or state.startswith("08")
    lost = type(error.orig).__name__ in ("OperationalError", "InterfaceError")
    return error.connection_invalidated or (lost and "authentication failed" not in str(error.orig))


def make_private(path: Path) -> None:
    """The file with mode 0600 before SQLite writes to it; its -wal and -shm take their mode from it."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        with suppress(FileNotFoundError):
            os.chmod(path.parent / name, 0o600)


def sqlite_engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(
        f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, pool_size=8
    )

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours, so that a writer can take the lock at once
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # takes effect in a new file only
        use_wal(connection)
        connection.execute("PRAGMA synchronous=NORMAL")

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def use_wal(connection: Any) -> None:
    """Switch to the write-ahead log. SQLite does not wait for a lock here, so two first openers need us to."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def refuse_network(path: Path, mounts: str | None = None) -> None:
    """Args: mounts as in `disk.filesystem_of`."""
    kind = filesystem_of(path, mounts)
    if kind in NETWORK:
        raise StoreError(f"{path} is on a network file system ({kind}), where SQLite's locks do not hold. {REMEDY}")
