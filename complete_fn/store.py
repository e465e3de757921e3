"""Answers, ledger and attempts in SQLite. A slice is committed in one transaction or it never happened."""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError

from complete_fn.disk import filesystem_of, process_started
from complete_fn.errors import StoreBusyError, StoreError
from complete_fn.ledger import LedgerLine, money
from complete_fn.tables import answers, attempts, ledger, metadata
from complete_fn.types import Asker, Completion, RowError, Usage

BUSY_SECONDS = 30
LOOK_UP = 500  # keys of one IN list; SQLite's oldest limit is 999
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "fuse.sshfs", "lustre", "ceph", "glusterfs")


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer to be written. `job` set: only that job may read it again (not greedy, an error, or cache off)."""

    key: bytes
    completion: Completion
    job: str | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One execution of run(): who asked, for which model and job."""

    id: int
    tenant: str
    user: str
    model: str
    job: str | None
    query_tag: str | None
    currency: str
    basis: str


STORES: weakref.WeakSet[Store] = weakref.WeakSet()


class Store:
    """The state of one machine user, in one SQLite file that several processes and threads may share.

    Raises:
        StoreError: the file cannot be used (read-only, corrupt, full disk, network file system, another version's).
        StoreBusyError: another process holds it longer than 30 s.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writing = threading.Lock()  # our threads take turns at once; SQLite's busy wait sleeps up to 100 ms
        refuse_network(path)
        with self.named_errors():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            make_private(path)
            self.engine = sqlite_engine(path)
            with self.write() as connection:
                refuse_version(connection, path)
                metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")
        STORES.add(self)
        self.sweep()

    def after_fork(self) -> None:
        """A forked child opens connections of its own: SQLite's must not be shared."""
        self.writing = threading.Lock()
        self.engine.dispose(close=False)

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        try:
            yield
        except (DatabaseError, OSError) as error:
            text = str(error.orig if isinstance(error, DatabaseError) else error)
            if "locked" in text or "busy" in text:
                raise StoreBusyError(f"Another process holds {self.path} since {BUSY_SECONDS} s; try again.") from error
            remedy = next((r for mark, r in REMEDIES.items() if mark in text), REMEDY)
            raise StoreError(f"The state file {self.path} cannot be used: {text}. {remedy}") from error

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        options = {"begin": "BEGIN IMMEDIATE"}
        with self.writing, self.named_errors(), self.connect(**options) as connection, connection.begin():
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        with self.named_errors(), self.connect() as connection, connection.begin():
            yield connection

    def connect(self, **options: Any) -> sa.Connection:
        return self.engine.connect().execution_options(**options)

    def close(self) -> None:
        self.engine.dispose()

    # -- answers -------------------------------------------------------------------------------------------------

    def look_up(self, tenant: str, keys: list[bytes], since: float = 0.0) -> dict[bytes, tuple[Completion, int]]:
        """(answer, attempt that made it) of the keys that have one made at or after `since` (seconds of the epoch)."""
        found: dict[bytes, tuple[Completion, int]] = {}
        with self.read() as connection:
            for low in range(0, len(keys), LOOK_UP):
                chosen = sa.select(answers).where(
                    answers.c.tenant == tenant,
                    answers.c.key.in_(keys[low : low + LOOK_UP]),
                    answers.c.created_at >= since,
                )
                for row in connection.execute(chosen).mappings():
                    found[row["key"]] = (completion_of(dict(row)), row["attempt"])
        return found

    def has_answers(self, tenant: str) -> bool:
        any_answer = sa.select(answers.c.id).where(answers.c.tenant == tenant).limit(1)
        with self.read() as connection:
            return connection.execute(any_answer).first() is not None

    # -- jobs ----------------------------------------------------------------------------------------------------

    def unfinished(self, tenant: str, job: str) -> tuple[set[int], float | None]:
        """(attempts of a job that has not ended, when the first of them began or None)."""
        of_job = (attempts.c.tenant == tenant) & (attempts.c.job == job) & (attempts.c.status != "ended")
        with self.read() as connection:
            rows = connection.execute(sa.select(attempts.c.id, attempts.c.began).where(of_job)).all()
        return {row.id for row in rows}, min((row.began for row in rows), default=None)

    def spent(self, tenant: str, job: str) -> Decimal:
        """Money billed to the attempts of a job that has not ended."""
        mine, _ = self.unfinished(tenant, job)
        total = sa.select(sa.func.coalesce(sa.func.sum(ledger.c.cost_nano), 0)).where(ledger.c.attempt.in_(mine))
        with self.read() as connection:
            return money(connection.execute(total).scalar_one())

    def end_job(self, tenant: str, job: str) -> None:
        """The job's results are safe: the answers that were kept only for its resume go."""
        mine = (attempts.c.tenant == tenant) & (attempts.c.job == job) & (attempts.c.status != "running")
        with self.write() as connection:
            connection.execute(answers.delete().where(answers.c.tenant == tenant, answers.c.job == job))
            connection.execute(attempts.update().where(mine).values(status="ended"))

    # -- attempts and slices -------------------------------------------------------------------------------------

    def begin(self, who: Asker, model: str, currency: str, basis: str) -> Attempt:
        self.sweep()
        row = {
            "tenant": who.tenant,
            "user": who.user,
            "model": model,
            "job": who.job,
            "query_tag": who.query_tag,
            "currency": currency,
            "basis": basis,
        }
        here = {
            "status": "running",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_started": process_started(os.getpid()) or 0.0,
            "began": time.time(),
            "reserved_rows": 0,
            "reserved_tokens": 0,
        }
        with self.write() as connection:
            made = connection.execute(attempts.insert().values(**row, **here).returning(attempts.c.id))
            return attempt_of({"id": made.scalar_one(), **row})

    def admit(self, attempt: Attempt, rows: int, tokens: int) -> None:
        """Note work that is about to be handed to the engine, so that a killed attempt's loss can be told."""
        with self.write() as connection:
            self.reserve(connection, attempt, rows, tokens)

    def commit(self, attempt: Attempt, done: list[Stored], lines: list[LedgerLine], rows: int, tokens: int) -> None:
        """One slice: its answers, its ledger lines, and the reservation of `rows` and `tokens` given back."""
        now = time.time()
        values = [answer_row(attempt, s, now) for s in done]
        with self.write() as connection:
            if values:
                connection.execute(answers.insert().prefix_with("OR REPLACE", dialect="sqlite"), values)
            self.write_lines(connection, attempt, lines, now)
            self.reserve(connection, attempt, -rows, -tokens)

    def finish(self, attempt: Attempt, status: str) -> bool:
        """Close a running attempt; what it had admitted and not committed is lost, and not billed."""
        with self.write() as connection:
            mine = (attempts.c.id == attempt.id) & (attempts.c.status == "running")
            columns = attempts.c.reserved_rows, attempts.c.reserved_tokens
            left = connection.execute(sa.select(*columns).where(mine)).first()
            if left is None:
                return False
            connection.execute(attempts.update().where(mine).values(status=status, ended=time.time()))
            if left.reserved_rows > 0:
                lost = LedgerLine("lost", left.reserved_rows, left.reserved_tokens)
                self.write_lines(connection, attempt, [lost], time.time())
        return True

    def reserve(self, connection: sa.Connection, attempt: Attempt, rows: int, tokens: int) -> None:
        more = {
            "reserved_rows": attempts.c.reserved_rows + rows,
            "reserved_tokens": attempts.c.reserved_tokens + tokens,
        }
        connection.execute(attempts.update().where(attempts.c.id == attempt.id).values(more))

    def write_lines(self, connection: sa.Connection, attempt: Attempt, lines: list[LedgerLine], at: float) -> None:
        if lines:
            connection.execute(ledger.insert(), [ledger_row(attempt, line, at) for line in lines])

    def sweep(self) -> int:
        """Close attempts whose process is gone; returns how many."""
        running = sa.select(attempts).where(attempts.c.status == "running", attempts.c.host == socket.gethostname())
        with self.read() as connection:
            rows = connection.execute(running).mappings().all()
        dead = [attempt_of(r) for r in rows if gone(r["pid"], r["pid_started"])]
        return sum(self.finish(attempt, "lost") for attempt in dead)


VERSION = 1
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


def refuse_version(connection: sa.Connection, path: Path) -> None:
    found = connection.exec_driver_sql("PRAGMA user_version").scalar()
    if found not in (0, VERSION):
        raise StoreError(
            f"The state file {path} has version {found}, this complete-fn reads version {VERSION}. "
            "Use the complete-fn that wrote it, or point COMPLETE_FN_HOME at another folder."
        )


def refuse_network(path: Path, mounts: str | None = None) -> None:
    """Args: mounts as in `disk.filesystem_of`."""
    kind = filesystem_of(path, mounts)
    if kind in NETWORK:
        raise StoreError(f"{path} is on a network file system ({kind}), where SQLite's locks do not hold. {REMEDY}")


def gone(pid: int, started: float) -> bool:
    now = process_started(pid)
    return now is None or (bool(started) and now != started)


def attempt_of(row: Mapping[Any, Any]) -> Attempt:
    return Attempt(**{f.name: row[f.name] for f in fields(Attempt)})


def answer_row(attempt: Attempt, stored: Stored, now: float) -> dict[str, Any]:
    c = stored.completion
    return {
        "tenant": attempt.tenant,
        "key": stored.key,
        "job": stored.job,
        "attempt": attempt.id,
        "model": attempt.model,
        "text": c.text,
        "finish_reason": c.finish_reason,
        "error_code": c.error.code if c.error else None,
        "error_message": c.error.message if c.error else None,
        "prompt_tokens": c.usage.prompt_tokens,
        "cached_tokens": c.usage.cached_tokens,
        "completion_tokens": c.usage.completion_tokens,
        "bytes": 200 + len((c.text or "").encode()),
        "created_at": now,
    }


def ledger_row(attempt: Attempt, line: LedgerLine, at: float) -> dict[str, Any]:
    return {
        "at": at,
        "tenant": attempt.tenant,
        "user": attempt.user,
        "attempt": attempt.id,
        "query_tag": attempt.query_tag,
        "model": attempt.model,
        "price_class": line.price_class,
        "rows": line.rows,
        "tokens": line.tokens,
        "cost_nano": line.cost_nano,
        "saved_nano": line.saved_nano,
        "currency": attempt.currency,
        "basis": attempt.basis,
    }


def completion_of(row: Mapping[str, Any]) -> Completion:
    error = RowError(row["error_code"], row["error_message"] or "") if row["error_code"] else None
    return Completion(
        text=row["text"],
        finish_reason=row["finish_reason"],
        error=error,
        usage=Usage(row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"]),
        source="cache",
    )


def after_fork() -> None:
    for store in STORES:
        store.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)
