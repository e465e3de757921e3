"""One SQLite file holds the store of one machine, with one writer at a time."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from complete_fn.errors import StoreBusyError, StoreError, StoreFullError
from complete_fn.host import filesystem_of
from complete_fn.store.backends import cause
from complete_fn.store.clock import HostClock, StoreClock

BUSY_SECONDS = 30
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "fuse.sshfs", "lustre", "ceph", "glusterfs")
REMEDY = "Point COMPLETE_FN_HOME at a folder on a local disk that you may write to."
BROKEN = (
    "Move the file away: the next run begins a new one (`sqlite3 FILE .recover` shows what can be read of this one)."
)
FULL = ("full", "No space")
SPACE = "Free some space: what was committed is safe, run again to go on."
REMEDIES = {
    **dict.fromkeys(FULL, SPACE),
    "malformed": BROKEN,
    "not a database": BROKEN,
}
PAGES = 4_096  # SQLite pages returned to the file system in one transaction, so that other writers do not wait long


class SqliteBackend:
    """One file with mode 0600 and a write-ahead log."""

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, str(path)
        self.clock: StoreClock = HostClock()
        self.writing = threading.Lock()  # wakes our next thread at once; SQLite's own busy wait sleeps up to 100 ms
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
        kind = StoreFullError if any(mark in text for mark in (*FULL, "disk I/O")) else StoreError
        return kind(f"The state file {self.place} cannot be used: {text}. {remedy}")

    def lock_schema(self, connection: sa.Connection) -> None:
        """Nothing to do: SQLite's BEGIN IMMEDIATE already holds the write lock."""

    def used_bytes(self, connection: sa.Connection) -> int:
        """Bytes of the file's pages that are in use."""
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
        """Make a forked child open its own connections: processes must not share SQLite's."""
        self.writing = threading.Lock()
        self.engine.dispose(close=False)


def make_private(path: Path) -> None:
    """Create the file with mode 0600 before SQLite writes to it. Its -wal and -shm files inherit the mode."""
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
        connection.isolation_level = None  # we issue BEGIN ourselves, so that a writer can take the lock at once
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # has an effect only in a new file
        use_wal(connection)
        connection.execute("PRAGMA synchronous=NORMAL")

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def use_wal(connection: Any) -> None:
    """Switch to the write-ahead log. SQLite does not wait for this lock, so we wait, as two processes may be first."""
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
    """Raises:
    StoreError: The file is on a network file system. `mounts` as in `host.filesystem_of`.
    """
    kind = filesystem_of(path, mounts)
    if kind in NETWORK:
        raise StoreError(f"{path} is on a network file system ({kind}), where SQLite's locks do not hold. {REMEDY}")


def open_sqlite(url: sa.URL) -> SqliteBackend:
    return SqliteBackend(Path(url.database or ""))
