"""`Store` keeps answers, ledger and attempts, in SQLite or PostgreSQL. One transaction commits a slice, or nothing.

A database can go away while it answers a COMMIT, so every change can be repeated safely. Each change of an attempt has
a number. A repeated change finds its number in the store and does nothing.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, InterfaceError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from complete_fn.errors import StoreBusyError, StoreError, StoreFullError, StoreLostError, StoreUpgradedError
from complete_fn.host import here, process_started, renew_in_child
from complete_fn.store.attempts import Attempt, StoredAnswer, attempt_of
from complete_fn.store.backends import open_database
from complete_fn.store.budget_holds import Refused, charge, draw, release
from complete_fn.store.claims import claim, claimed, drop_claims, let_all_go, let_go, silent_holders, still_held
from complete_fn.store.fork_gate import FORKS
from complete_fn.store.records import LedgerLine, answer_row, completion_of, ledger_row, money
from complete_fn.store.rollup import add_to_hours
from complete_fn.store.schema import HEAD, is_current, migrate, noted_version
from complete_fn.store.sqlite_backend import SqliteBackend
from complete_fn.store.tables import answers, attempts, budgets, ledger, summed
from complete_fn.store.transactions import retried, upsert
from complete_fn.types import Asker, Completion

LOOK_UP = 500  # keys in one IN list; old SQLite versions take at most 999 parameters
SEEN_SECONDS = 20.0  # how often a running attempt reports that it lives
SILENT_SECONDS = 180.0  # an attempt of another machine that is silent for so long counts as lost


class Store:
    """The state of one machine's user or of one service, shared by any number of processes and threads.

    Args:
        url_or_path: a SQLite file, or postgresql://USER:PASSWORD@HOST:PORT/DATABASE.
        waits_for_space: whether a full disk is waited for, as a database that is away is. A service's work would fail
            by it; a person at a shell reads the error and frees some space.

    Raises:
        StoreError: The store is read-only, corrupt, on a network file system, or of a newer version.
        StoreFullError: The SQLite file's disk is full.
        StoreBusyError: Another process holds the SQLite file for longer than 30 s.
        StoreLostError: The database does not answer.
    """

    def __init__(self, url_or_path: str | Path, waits_for_space: bool = False) -> None:
        self.database, self.waits_for_space = open_database(url_or_path), waits_for_space
        self.is_outdated = False
        with self.read() as connection:
            current = is_current(connection)
        if not current:
            with self.write() as connection:
                migrate(connection, self.database)
        renew_in_child(self.database)
        self.sweep()

    @property
    def store(self) -> Store:
        return self

    @property
    def place(self) -> str:
        """The store's name in messages: a path, or a URL without its password."""
        return self.database.place

    @property
    def path(self) -> Path:
        """The path of the SQLite file.

        Raises:
            StoreError: The store is in PostgreSQL.
        """
        if not isinstance(self.database, SqliteBackend):
            raise StoreError(f"The store {self.place} is no file.")
        return self.database.path

    @property
    def engine(self) -> sa.Engine:
        return self.database.engine

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        try:
            yield
        except PoolTimeoutError as error:
            raise StoreBusyError("All connections to the store are in use. Try again in a moment.") from error
        except (DatabaseError, InterfaceError, OSError) as error:
            fault = self.database.fault(error)
            if self.waits_for_space and isinstance(fault, StoreFullError):
                fault = StoreLostError(str(fault))
            raise fault from error

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        options = {"begin": "BEGIN IMMEDIATE"}
        with (
            FORKS,
            self.database.writing,
            self.named_errors(),
            self.connect(**options) as connection,
            connection.begin(),
        ):
            self.database.clock.compare(connection)
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        with FORKS, self.named_errors(), self.connect() as connection, connection.begin():
            self.database.clock.compare(connection)
            yield connection

    def connect(self, **options: Any) -> sa.Connection:
        return self.engine.connect().execution_options(**options)

    def now(self) -> float:
        """The time in seconds of the epoch, by the clock that all users of the store share."""
        return self.database.clock.now()

    def ping(self) -> None:
        """Raises:
        StoreError: The database does not answer.
        """
        with self.read() as connection:
            connection.execute(sa.select(1))

    def refuse_upgraded(self) -> None:
        """Raises:
        StoreUpgradedError: A newer version has changed the schema since this process opened the store.
        """
        with self.read() as connection:
            self.refuse_newer_schema(connection)

    def refuse_newer_schema(self, connection: sa.Connection) -> None:
        self.is_outdated = self.is_outdated or noted_version(connection) != HEAD
        if self.is_outdated:
            raise StoreUpgradedError

    def close(self) -> None:
        self.engine.dispose()

    # -- answers -------------------------------------------------------------------------------------------------

    @retried
    def look_up(self, tenant: str, keys: list[bytes], since: float = 0.0) -> dict[bytes, tuple[Completion, int]]:
        """(answer, its attempt) for each key that has an answer made at or after `since` (seconds of the epoch)."""
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

    @retried
    def has_answers(self, tenant: str) -> bool:
        any_answer = sa.select(answers.c.id).where(answers.c.tenant == tenant).limit(1)
        with self.read() as connection:
            return connection.execute(any_answer).first() is not None

    # -- jobs ----------------------------------------------------------------------------------------------------

    @retried
    def unfinished(self, tenant: str, job: str, ended: bool = False) -> tuple[set[int], float | None]:
        """(attempts of a job, start of the first of them or None). Without `ended` only of a job that has not ended."""
        of_job = (attempts.c.tenant == tenant) & (attempts.c.job == job)
        if not ended:
            of_job &= attempts.c.status != "ended"
        with self.read() as connection:
            rows = connection.execute(sa.select(attempts.c.id, attempts.c.began).where(of_job)).all()
        return {row.id for row in rows}, min((row.began for row in rows), default=None)

    @retried
    def spent(self, tenant: str, job: str) -> Decimal:
        """The money billed to the attempts of a job that has not ended."""
        mine, _ = self.unfinished(tenant, job)
        total = sa.select(summed(ledger.c.cost_nano)).where(ledger.c.attempt.in_(mine))
        with self.read() as connection:
            return money(connection.execute(total).scalar_one())

    @retried
    def end_job(self, tenant: str, job: str) -> None:
        """End a job whose results are safe: delete the answers that were kept only for its resume."""
        mine = (attempts.c.tenant == tenant) & (attempts.c.job == job) & (attempts.c.status != "running")
        with self.write() as connection:
            connection.execute(answers.delete().where(answers.c.tenant == tenant, answers.c.job == job))
            connection.execute(attempts.update().where(mine).values(status="ended"))

    # -- attempts and slices -------------------------------------------------------------------------------------

    def begin(self, who: Asker, model: str, currency: str, basis: str) -> Attempt:
        """Raises:
        StoreError: The attempt is for a job's part, and the part's lease now belongs to another worker.
        StoreUpgradedError: A newer version has upgraded the store under this process.
        """
        self.sweep()
        name = (int(self.now() * 1e6) << 10) + secrets.randbelow(1 << 10)  # our own id shows whether an insert repeats
        job, tag = who.job, who.query_tag
        attempt = Attempt(name, who.tenant, who.user, model, job, tag, currency, basis)
        self.insert_attempt(attempt, who.claim)
        return attempt

    @retried
    def insert_attempt(self, attempt: Attempt, of_claim: tuple[int, str] | None) -> None:
        now = self.now()
        row = {f.name: getattr(attempt, f.name) for f in fields(Attempt) if f.name in attempts.c}
        this = {"host": here(), "pid": os.getpid(), "pid_started": process_started(os.getpid()) or 0.0}
        with self.write() as connection:
            self.refuse_newer_schema(connection)
            if of_claim is not None and not still_held(connection, *of_claim):
                raise StoreError(GIVEN_UP)
            if connection.execute(sa.select(attempts.c.id).where(attempts.c.id == attempt.id)).first() is None:
                times = {"status": "running", "began": now, "seen_at": now}
                connection.execute(attempts.insert().values(**row, **this, **times))

    @retried
    def claim(self, attempt: Attempt, keys: list[bytes]) -> set[bytes]:
        """Claim keys. Returns those that this attempt must compute; others have answers or another attempt's claim."""
        with self.write() as connection:
            return claim(connection, attempt, keys)

    @retried
    def claimed(self, tenant: str, keys: list[bytes]) -> set[bytes]:
        """The keys that some attempt is computing."""
        with self.read() as connection:
            return claimed(connection, tenant, keys)

    @retried
    def drop_claims(self) -> None:
        """End the claims of attempts that are over, were killed, or are silent, for example in a suspended process.

        Silent attempts are closed as lost, because other attempts now compute the keys that they held.
        """
        self.sweep()
        with self.write() as connection:
            for row in connection.execute(silent_holders(self.now() - SILENT_SECONDS)).mappings().all():
                self.close_attempt(connection, attempt_of(row), "lost")
            drop_claims(connection)

    def admit(self, attempt: Attempt, rows: int, tokens: int) -> None:
        """Note work that the engine is about to get, so that the ledger can tell what a killed attempt lost."""
        self.change(attempt, rows, tokens)

    def commit(
        self,
        attempt: Attempt,
        done: list[StoredAnswer],
        lines: list[LedgerLine],
        rows: int,
        tokens: int,
        claims: Set[bytes] = frozenset(),
    ) -> None:
        """Write one slice: its answers and ledger lines. Release `claims` and the reservation of `rows` and `tokens`.

        Raises:
            StoreError: The slice cannot be written, or the attempt was given up as lost.
        """
        now = self.now()
        values = [answer_row(attempt, s, now) for s in sorted(done, key=lambda s: s.key)]  # sorted against deadlocks

        def write(connection: sa.Connection) -> None:
            if values:
                upsert(connection, answers, ("tenant", "key"), values)
            charge(connection, attempt, sum(line.cost_nano for line in lines), now)
            let_go(connection, attempt, claims)
            self.write_lines(connection, attempt, lines, now)

        self.change(attempt, -rows, -tokens, write)

    def touch(self, attempt: Attempt) -> None:
        """Report that the attempt lives."""
        self.change(attempt, 0, 0)

    def change(
        self, attempt: Attempt, rows: int, tokens: int, write: Callable[[sa.Connection], None] | None = None
    ) -> None:
        """Make one numbered change of a running attempt: reserve `rows` and `tokens` more, and call `write`."""
        with attempt.turn:
            self.change_once(attempt, rows, tokens, write)
            attempt.step += 1

    @retried
    def change_once(
        self, attempt: Attempt, rows: int, tokens: int, write: Callable[[sa.Connection], None] | None
    ) -> None:
        mine = (attempts.c.id == attempt.id) & (attempts.c.status == "running")
        values = {
            "step": attempt.step + 1,
            "reserved_rows": attempts.c.reserved_rows + rows,
            "reserved_tokens": attempts.c.reserved_tokens + tokens,
            "seen_at": self.now(),
        }
        with self.write() as connection:
            if connection.execute(
                attempts.update().where(mine, attempts.c.step == attempt.step).values(values)
            ).rowcount:
                if write is not None:
                    write(connection)
            elif connection.execute(sa.select(attempts.c.step).where(mine)).scalar() != attempt.step + 1:
                raise StoreError(GIVEN_UP)

    @retried
    def finish(self, attempt: Attempt, status: str) -> bool:
        """Close a running attempt. Work that it admitted and did not commit is lost, and not billed."""
        with self.write() as connection:
            return self.close_attempt(connection, attempt, status)

    def close_attempt(self, connection: sa.Connection, attempt: Attempt, status: str) -> bool:
        mine = (attempts.c.id == attempt.id) & (attempts.c.status == "running")
        columns = attempts.c.reserved_rows, attempts.c.reserved_tokens
        left = connection.execute(sa.select(*columns).where(mine).with_for_update()).first()
        let_all_go(connection, attempt)
        if left is None:
            return False
        connection.execute(attempts.update().where(mine).values(status=status, ended=self.now()))
        release(connection, attempt)
        if left.reserved_rows > 0:
            lost = LedgerLine("lost", left.reserved_rows, left.reserved_tokens)
            self.write_lines(connection, attempt, [lost], self.now())
        return True

    # -- budgets -------------------------------------------------------------------------------------------------

    def draw(self, attempt: Attempt, nano: int) -> bool:
        """Reserve so much of every budget of the attempt. Returns False if one of the budgets has less left."""
        try:
            self.change(attempt, 0, 0, lambda connection: draw(connection, attempt, nano))
        except Refused:
            return False
        return True

    def put_back(self, attempt: Attempt) -> None:
        """Return the money that the attempt has drawn and not spent. No row of the attempt may be under way."""
        self.change(attempt, 0, 0, lambda connection: release(connection, attempt))

    @retried
    def budgets_of(self, attempt: Attempt) -> list[tuple[str, int, int]]:
        """(name, limit, spent) of the attempt's budgets, in 1e-9 of the currency."""
        columns = budgets.c.name, budgets.c.limit_nano, budgets.c.spent_nano
        mine = (budgets.c.tenant == attempt.tenant) & budgets.c.name.in_(attempt.budgets)
        with self.read() as connection:
            return [(r[0], r[1], r[2]) for r in connection.execute(sa.select(*columns).where(mine))]

    @retried
    def note(self, model: str, currency: str, basis: str, lines: list[LedgerLine]) -> None:
        """Write ledger lines of an engine that belong to no attempt."""
        with self.write() as connection:
            self.write_lines(connection, Attempt(0, "-", "-", model, None, None, currency, basis), lines, self.now())

    def write_lines(self, connection: sa.Connection, attempt: Attempt, lines: list[LedgerLine], at: float) -> None:
        """Write ledger lines, last in their transaction: other commits wait for the sums of the hour that it locks."""
        if lines:
            rows = [ledger_row(attempt, line, at) for line in lines]
            connection.execute(ledger.insert(), rows)
            add_to_hours(connection, rows)

    @retried
    def sweep(self) -> int:
        """Close attempts whose process is gone, or silent on another machine. Returns their number."""
        silent = attempts.c.seen_at < self.now() - SILENT_SECONDS
        running = sa.select(attempts).where(attempts.c.status == "running", (attempts.c.host == here()) | silent)
        with self.read() as connection:
            rows = connection.execute(running).mappings().all()
        dead = [attempt_of(r) for r in rows if r["host"] != here() or gone(r["pid"], r["pid_started"])]
        return sum(self.finish(attempt, "lost") for attempt in dead)

    def lose(self, connection: sa.Connection, tenant: str, job: str) -> None:
        """Close a part's running attempts before another worker gets the part: they can commit nothing any more."""
        of_job = (attempts.c.tenant == tenant) & (attempts.c.job == job) & (attempts.c.status == "running")
        for row in connection.execute(sa.select(attempts).where(of_job)).mappings().all():
            self.close_attempt(connection, attempt_of(row), "lost")


GIVEN_UP = "The run was given up as lost: it was silent for too long. What it committed is safe; run again."


def gone(pid: int, started: float) -> bool:
    now = process_started(pid)
    return now is None or (bool(started) and now != started)
