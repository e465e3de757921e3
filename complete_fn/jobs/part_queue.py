"""`PartQueue` lets workers claim parts of jobs, under a named claim with a lease, finish them and give them back."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from complete_fn.host import here, process_started
from complete_fn.jobs.job import LEASE_SECONDS, TRIES, Part
from complete_fn.jobs.job_store import PART, cancel_queued_of_stopping, settle_job, stop_job
from complete_fn.store.job_tables import jobs, parts, tenants
from complete_fn.store.store import Store, gone
from complete_fn.store.tables import attempts, ledger, summed
from complete_fn.store.transactions import retried

Wanted = Callable[[Any], sa.ColumnElement[bool]]  # makes a condition on the column of models
DEATHS = 10  # so many workers must die in a row on one part, without an answer, before the part fails
DEADLY = f"{DEATHS} workers in a row died on a part of the job before they answered a row of it."
SHARE_SECONDS = 600.0  # parts that a tenant got longer ago do not count against it


def worker_name(number: int) -> str:
    """A worker's name. It names the process, so that others on its machine can tell when the process is gone."""
    pid = os.getpid()
    return f"{here()}|{pid}|{process_started(pid) or 0.0}|{number}"


def worker_gone(worker: str) -> bool:
    host, pid, started, _ = worker.split("|")
    return host == here() and gone(int(pid), float(started))


class PartQueue:
    """The parts of one store that wait for a worker or that a worker holds. Each step is one transaction."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.swept = 0  # parts whose lease ran out, in this process's life

    def claim(self, worker: str, model: str | None = None) -> Part | None:
        """Claim the next part for `worker`, in one statement that skips the parts that others are claiming.

        The order of preference:
        1. the tenant that was served least in the last 10 minutes: estimated tokens over the tenant's weight
        2. the tenant that was served longest ago
        3. the job with the highest priority, then the oldest job
        4. a part that this process had, or the part behind it: its engine is warm for them
        5. a part whose part before it does not run; of these, the one that shares least with it
        6. a part that another process would go on with

        Args:
            model: only parts of this model.
        """

        def wanted(c: Any) -> sa.ColumnElement[bool]:
            return sa.true() if model is None else c == model

        return self.claim_as(secrets.token_hex(8), worker, wanted, ("queued", "running"))

    def claim_stopped(self, worker: str, not_of: Collection[str] = ()) -> Part | None:
        """Claim a part of a job that stops, to salvage it: the part was begun and given back.

        The worker makes the part's result from the answers that the part has committed.

        Args:
            not_of: Models whose parts this worker leaves to other workers.
        """
        return self.claim_as(secrets.token_hex(8), worker, lambda c: c.not_in(not_of), ("stopping",))

    @retried
    def claim_as(self, name: str, worker: str, wanted: Wanted, of_jobs: Sequence[str]) -> Part | None:
        """Claim a part. `name` is the claim's own, by which a retry finds the part that it has claimed already."""
        before = (parts.c.claim == name) & (parts.c.status == "running")
        now, process = self.store.now(), worker.rpartition("|")[0]
        leased: dict[str, Any] = {"status": "running", "worker": worker, "claimant": process, "claim": name}
        leased |= {"claimed_at": now, "lease_until": now + LEASE_SECONDS}
        first = next_part(now, process, wanted, of_jobs).scalar_subquery()
        claim = parts.update().where(parts.c.id == first, parts.c.status == "queued")
        with self.store.write() as connection:
            row = connection.execute(sa.select(*PART).where(before)).first()
            if row is not None:
                return Part(*row)
            row = connection.execute(claim.values(leased).returning(*PART)).first()
            if row is None:
                return None
            begun = jobs.update().where(jobs.c.id == row.job, jobs.c.status == "queued")
            connection.execute(begun.values(status="running", started_at=now))
        return Part(*row)

    @retried
    def renew(self, held: Iterable[Part]) -> None:
        """Renew the leases of the parts that no other worker has claimed since."""
        until = self.store.now() + LEASE_SECONDS
        with self.store.write() as connection:
            for part in sorted(held, key=lambda p: p.id):
                connection.execute(parts.update().where(holds(part)).values(lease_until=until))

    @retried
    def lost(self, held: Sequence[Part]) -> dict[int, str]:
        """The parts that the worker must stop, by id, with the reason.

        The reason is `job` (the job stops) or `lease` (another worker has the part).
        """
        if not held:
            return {}
        chosen = (
            sa.select(parts.c.id, parts.c.claim, parts.c.status, jobs.c.status.label("job_status"))
            .join(jobs, jobs.c.id == parts.c.job)
            .where(parts.c.id.in_([p.id for p in held]))
        )
        with self.store.read() as connection:
            rows = {r.id: r for r in connection.execute(chosen)}
        why = {}
        for part in held:
            row = rows.get(part.id)
            if row is None or row.claim != part.claim or row.status != "running":
                why[part.id] = "lease"
            elif row.job_status not in ("queued", "running"):
                why[part.id] = "job"
        return why

    @retried
    def finish(self, part: Part, status: str, result: str, failed: int, size: int = 0) -> bool:
        """Commit the part's result; False, and nothing is committed, if another worker has the part.

        Args:
            size: the bytes of the result's file.
        """
        values = {"status": status, "result": result, "failed": failed, "worker": None}
        with self.store.write() as connection:
            if connection.execute(parts.update().where(holds(part)).values(values)).rowcount == 0:
                again = sa.select(parts.c.id).where(of_claim(part), parts.c.status == status, parts.c.result == result)
                return connection.execute(again).first() is not None  # the answer to the first commit was lost
            connection.execute(jobs.update().where(jobs.c.id == part.job).values(bytes=jobs.c.bytes + size))
            settle_job(connection, part.job, self.store.now())
        return True

    @retried
    def give_back(
        self, part: Part, delay: float = 0.0, error: str | None = None, tries: int = TRIES, salvage: bool = False
    ) -> None:
        """Queue the part again. With an `error` it counts as a failed try; after `tries` failed tries the job fails."""
        with self.store.write() as connection:
            give_back_part(connection, part, self.store.now(), delay, error, tries, salvage)

    @retried
    def fail(self, part: Part, error: str, salvage: bool = False) -> None:
        """Fail the job of a part that cannot be run. The part itself is queued to be salvaged, see `claim_stopped`.

        Args:
            salvage: Salvaging is what failed, so the part fails too.
        """
        with self.store.write() as connection:
            fail_part(connection, part, self.store.now(), error, salvage)

    def sweep(self) -> int:
        """Queue the parts again whose lease has run out or whose worker's process is gone; returns their number."""
        now = self.store.now()
        dead = [p for p in self.running() if p.lease_until < now or worker_gone(p.worker or "|0|0|")]
        taken = sum(self.take_back(part, DEADLY if self.deadly(part) else None) for part in dead)
        self.swept += taken
        return taken

    @retried
    def running(self) -> list[Part]:
        with self.store.read() as connection:
            return [Part(*r) for r in connection.execute(sa.select(*PART).where(parts.c.status == "running"))]

    @retried
    def take_back(self, part: Part, error: str | None) -> bool:
        """Give a part back for a worker that seems dead; False if it renewed its lease or another sweep was first."""
        same_lease = holds(part) & (parts.c.lease_until == part.lease_until)
        with self.store.write() as connection:
            if connection.execute(sa.select(parts.c.id).where(same_lease).with_for_update()).first() is None:
                return False
            self.store.lose(connection, part.tenant, part.name)  # a worker that only seemed dead must pay no more rows
            salvage = connection.execute(sa.select(jobs.c.status).where(jobs.c.id == part.job)).scalar() == "stopping"
            give_back_part(connection, part, self.store.now(), 0.0, error, 1, salvage)
        return True

    def deadly(self, part: Part) -> bool:
        """Whether the last `DEATHS` workers that took the part died before they had answered a row of it."""
        mine = (attempts.c.tenant == part.tenant) & (attempts.c.job == part.name)
        answered = sa.exists().where(ledger.c.attempt == attempts.c.id, ledger.c.price_class == "input")
        newest = sa.select(attempts.c.status, answered).where(mine).order_by(attempts.c.id.desc()).limit(DEATHS)
        with self.store.read() as connection:
            rows = connection.execute(newest).all()
        return len(rows) == DEATHS and all(s in ("lost", "running") and not answers for s, answers in rows)


def of_claim(part: Part) -> sa.ColumnElement[bool]:
    return (parts.c.id == part.id) & (parts.c.claim == part.claim)


def holds(part: Part) -> sa.ColumnElement[bool]:
    return of_claim(part) & (parts.c.status == "running")


def next_part(now: float, process: str, wanted: Wanted, of_jobs: Sequence[str]) -> sa.Select[Any]:
    """The query for the id of the part to claim. It locks the part's row and skips rows that others have locked."""
    waiting, served, before = parts.alias("waiting"), parts.alias("served"), parts.alias("before")
    # Not the column itself: SQLite would take the index that is in the order of tenants, and read all of it.
    tenant = served.c.tenant.concat(sa.literal_column("''"))
    lately = (
        sa.select(tenant.label("tenant"), summed(served.c.tokens).label("tokens"))
        .where(served.c.claimed_at > now - SHARE_SECONDS)
        .group_by(tenant)
        .subquery("lately")
    )
    last_served = sa.select(sa.func.max(served.c.claimed_at)).where(served.c.tenant == waiting.c.tenant)
    share = sa.func.coalesce(lately.c.tokens, 0) / sa.func.coalesce(tenants.c.weight, 1.0)
    follows = (before.c.job == waiting.c.job) & (before.c.number == waiting.c.number - 1)
    mine = (before.c.claimant == process) | (waiting.c.claimant == process)
    warmth = sa.case((mine, 0), (before.c.status == "running", 2), else_=1)
    chosen = (
        sa.select(waiting.c.id)
        .join(jobs, jobs.c.id == waiting.c.job)
        .outerjoin(lately, lately.c.tenant == waiting.c.tenant)
        .outerjoin(tenants, tenants.c.name == waiting.c.tenant)
        .outerjoin(before, follows)
        .where(waiting.c.status == "queued", waiting.c.not_before <= now, jobs.c.status.in_(of_jobs))
        .order_by(
            share,
            last_served.scalar_subquery().asc().nulls_first(),
            jobs.c.priority.desc(),
            jobs.c.created_at,
            warmth,
            sa.case((mine, 0), else_=waiting.c.shared),
            waiting.c.number,
        )
        .limit(1)
        .with_for_update(of=waiting, skip_locked=True)
    )
    return chosen.where(wanted(waiting.c.model))


def give_back_part(
    connection: sa.Connection, part: Part, now: float, delay: float, error: str | None, tries: int, salvage: bool
) -> None:
    tried = part.tries + (error is not None)
    if error is not None and tried >= tries:
        fail_part(connection, part, now, error, salvage)
        return
    again = {"status": "queued", "worker": None, "tries": tried, "not_before": now + delay}
    connection.execute(parts.update().where(holds(part)).values(again))
    cancel_queued_of_stopping(connection, part.job, now)


def fail_part(connection: sa.Connection, part: Part, now: float, error: str, salvage: bool) -> None:
    to_salvage = {"status": "queued", "worker": None, "tries": 0, "not_before": 0.0}
    ended = {"status": "failed"} if salvage else to_salvage
    if connection.execute(parts.update().where(holds(part)).values(ended)).rowcount:
        stop_job(connection, part.job, now, "failed", error)
