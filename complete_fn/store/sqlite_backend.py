"""A store in one SQLite file: for one machine, one writer at a time."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from complete_fn.errors import StoreBusyError, StoreError
from complete_fn.host import filesystem_of
from complete_fn.store.backends import cause

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
PAGES = 4_096  # of SQLite, given back to the file system in one transaction


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
        """Nothing to do: SQLite's BEGIN IMMEDIATE already holds the write lock."""

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


def open_sqlite(url: sa.URL) -> SqliteBackend:
    return SqliteBackend(Path(url.database or ""))
