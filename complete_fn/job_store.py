"""Jobs and parts in the store: claims with a lease and a fence, commits, stops. Each step is one transaction."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

import sqlalchemy as sa

from complete_fn.disk import process_started
from complete_fn.errors import JobError, NotFoundError
from complete_fn.jobs import JOB_OPEN, LEASE_SECONDS, TRIES, Counts, Job, Part, refuse_move
from complete_fn.service_tables import jobs, parts
from complete_fn.store import Store, gone
from complete_fn.tables import answers, attempts, ledger

JOB = [jobs.c[f.name] for f in fields(Job)]
PART = [parts.c[f.name] for f in fields(Part)]
UNFINISHED = ("queued", "running")


def worker_name(number: int) -> str:
    """Names a worker so that others on its machine can tell when its process is gone."""
    pid = os.getpid()
    return f"{socket.gethostname()}|{pid}|{process_started(pid) or 0.0}|{number}"


def worker_gone(worker: str) -> bool:
    host, pid, started, _ = worker.split("|")
    return host == socket.gethostname() and gone(int(pid), float(started))


class JobStore:
    """The jobs of one state file."""

    def __init__(self, store: Store) -> None:
        self.store = store

    # -- what callers do -----------------------------------------------------------------------------------------

    def create(self, job: Job, pieces: Sequence[dict[str, Any]]) -> Job:
        """The job with its parts; with an idempotency key known already, the job that has it.

        Args:
            pieces: `model`, `options`, `rows` and `tokens` of each part, in order.

        Raises:
            JobError: the key belongs to another request.
        """
        with self.store.write() as connection:
            if job.idempotency_key is not None:
                mine = (jobs.c.tenant == job.tenant) & (jobs.c.idempotency_key == job.idempotency_key)
                row = connection.execute(sa.select(*JOB).where(mine)).first()
                if row is not None:
                    return same_request(Job(*row), job)
            connection.execute(jobs.insert().values(asdict(job)))
            rows = [
                {"job": job.id, "tenant": job.tenant, "number": n, "status": "queued", **piece}
                for n, piece in enumerate(pieces)
            ]
            if rows:
                connection.execute(parts.insert(), rows)
            settle(connection, job.id)
            return Job(*connection.execute(sa.select(*JOB).where(jobs.c.id == job.id)).one())

    def get(self, tenant: str, job: str, kind: str | None = None) -> Job:
        """Raises:
        NotFoundError: the tenant has no such job.
        """
        with self.store.read() as connection:
            row = connection.execute(sa.select(*JOB).where(jobs.c.id == job, jobs.c.tenant == tenant)).first()
        if row is None or kind not in (None, row.kind):
            raise NotFoundError(f"There is no {'batch' if kind == 'batch' else 'job'} {job!r}.")
        return Job(*row)

    def newest(self, tenant: str, kind: str, limit: int, after: str | None) -> list[Job]:
        """The tenant's jobs, newest first, from behind the job `after` on."""
        chosen = sa.select(*JOB).where(jobs.c.tenant == tenant, jobs.c.kind == kind)
        if after is not None:
            last = self.get(tenant, after)
            chosen = chosen.where(sa.tuple_(jobs.c.created_at, jobs.c.id) < sa.tuple_(last.created_at, last.id))
        last_first = chosen.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        with self.store.read() as connection:
            return [Job(*row) for row in connection.execute(last_first)]

    def parts(self, job: str) -> list[Part]:
        with self.store.read() as connection:
            return [Part(*r) for r in connection.execute(sa.select(*PART).where(parts.c.job == job).order_by("number"))]

    def counts(self, job: Job) -> Counts:
        """How far the job is, rows of running parts included as they are committed."""
        of_job = (attempts.c.job >= f"{job.id}/") & (attempts.c.job < f"{job.id}0")  # "0" follows "/"
        lines = ledger.join(attempts, ledger.c.attempt == attempts.c.id)
        sums = sa.select(
            of_class(ledger.c.tokens, "input", "cached_input"),
            of_class(ledger.c.tokens, "cached_input"),
            of_class(ledger.c.tokens, "output"),
            sa.func.coalesce(sa.func.sum(ledger.c.cost_nano), 0),
        )
        live = sa.select(attempts.c.job, of_class(ledger.c.rows, "input", "duplicate", "reused"))
        with self.store.read() as connection:
            tokens = connection.execute(sums.select_from(lines).where(of_job)).one()
            rows = {r[0]: r[1] for r in connection.execute(live.select_from(lines).where(of_job).group_by("job"))}
        found = self.parts(job.id)
        done = job.nulls + sum(p.rows if p.status == "done" else min(p.rows, rows.get(p.name, 0)) for p in found)
        return Counts(done, sum(p.failed for p in found if p.status == "done"), *tokens)

    def stop(self, job: Job, ends_as: str, error: str | None = None) -> Job:
        """Nothing more of the job is begun; it ends once its running parts have let go.

        Raises:
            JobError: it is over already.
        """
        refuse_move(job, "stopping" if job.status != "stopping" else ends_as)
        with self.store.write() as connection:
            stop(connection, job.id, ends_as, error)
        return self.get(job.tenant, job.id)

    def delete(self, job: Job) -> None:
        """The job, its parts and the answers that it computed. Its ledger lines stay; they have no text.

        Raises:
            JobError: it is not over.
        """
        if not job.over:
            raise JobError(f"Job {job.id} is {job.status}. Cancel it first.")
        of_job = (attempts.c.job >= f"{job.id}/") & (attempts.c.job < f"{job.id}0")
        with self.store.write() as connection:
            made = sa.select(attempts.c.id).where(of_job)
            connection.execute(answers.delete().where(answers.c.tenant == job.tenant, answers.c.attempt.in_(made)))
            connection.execute(parts.delete().where(parts.c.job == job.id))
            connection.execute(jobs.delete().where(jobs.c.id == job.id))

    # -- what workers do -----------------------------------------------------------------------------------------

    def claim(self, worker: str, now: float | None = None) -> Part | None:
        """The next part, leased to `worker`: of the tenant served longest ago; of its jobs by priority, then age."""
        now = time.time() if now is None else now
        waiting, served = parts.alias("waiting"), parts.alias("served")
        last_served = sa.select(sa.func.max(served.c.claimed_at)).where(served.c.tenant == waiting.c.tenant)
        first = (
            sa.select(waiting.c.id)
            .join(jobs, jobs.c.id == waiting.c.job)
            .where(waiting.c.status == "queued", waiting.c.not_before <= now, jobs.c.status.in_(("queued", "running")))
            .order_by(
                last_served.scalar_subquery().asc().nulls_first(),
                jobs.c.priority.desc(),
                jobs.c.created_at,
                waiting.c.number,
            )
            .limit(1)
        )
        leased = {"status": "running", "worker": worker, "lease_until": now + LEASE_SECONDS, "claimed_at": now}
        claim = parts.update().where(parts.c.id == first.scalar_subquery(), parts.c.status == "queued")
        with self.store.write() as connection:
            row = connection.execute(claim.values(**leased, fence=parts.c.fence + 1).returning(*PART)).first()
            if row is None:
                return None
            started = {"status": "running", "started_at": sa.func.coalesce(jobs.c.started_at, now)}
            begun = jobs.update().where(jobs.c.id == row.job, jobs.c.status.in_(("queued", "running")))
            connection.execute(begun.values(started))
        return Part(*row)

    def waiting(self) -> bool:
        with self.store.read() as connection:
            return (
                connection.execute(sa.select(parts.c.id).where(parts.c.status == "queued").limit(1)).first() is not None
            )

    def renew(self, held: Iterable[Part], now: float | None = None) -> None:
        """Another lease for the parts whose fence is still theirs."""
        until = (time.time() if now is None else now) + LEASE_SECONDS
        with self.store.write() as connection:
            for part in held:
                connection.execute(parts.update().where(holds(part)).values(lease_until=until))

    def lost(self, held: Sequence[Part]) -> dict[int, str]:
        """Of the parts held, those to stop, and why: `job` (it is to stop) or `lease` (another worker has the part)."""
        if not held:
            return {}
        chosen = (
            sa.select(parts.c.id, parts.c.fence, parts.c.status, jobs.c.status.label("job_status"))
            .join(jobs, jobs.c.id == parts.c.job)
            .where(parts.c.id.in_([p.id for p in held]))
        )
        with self.store.read() as connection:
            rows = {r.id: r for r in connection.execute(chosen)}
        why = {}
        for part in held:
            row = rows.get(part.id)
            if row is None or row.fence != part.fence or row.status != "running":
                why[part.id] = "lease"
            elif row.job_status not in ("queued", "running"):
                why[part.id] = "job"
        return why

    def finish(self, part: Part, status: str, result: str, failed: int) -> bool:
        """Commit the part's result; False if the lease was lost, and nothing was committed."""
        values = {"status": status, "result": result, "failed": failed, "worker": None}
        with self.store.write() as connection:
            if connection.execute(parts.update().where(holds(part)).values(values)).rowcount == 0:
                return False
            settle(connection, part.job)
        return True

    def give_back(self, part: Part, delay: float = 0.0, error: str | None = None) -> None:
        """The part is to be run again. With an `error` that counts as a try, and the last one fails the job."""
        tries = part.tries + (error is not None)
        with self.store.write() as connection:
            if tries >= TRIES:
                if connection.execute(parts.update().where(holds(part)).values(status="failed", tries=tries)).rowcount:
                    stop(connection, part.job, "failed", error)
                return
            again = {"status": "queued", "worker": None, "tries": tries, "not_before": time.time() + delay}
            connection.execute(parts.update().where(holds(part)).values(again))
            cancel_queued_of_stopping(connection, part.job)

    def fail(self, part: Part, error: str) -> None:
        """The part cannot be run; its job fails."""
        with self.store.write() as connection:
            if connection.execute(parts.update().where(holds(part)).values(status="failed")).rowcount:
                stop(connection, part.job, "failed", error)

    def sweep(self, now: float | None = None) -> int:
        """Parts whose lease has run out, or whose worker's process is gone, are queued again; returns how many."""
        now = time.time() if now is None else now
        with self.store.read() as connection:
            running = [Part(*r) for r in connection.execute(sa.select(*PART).where(parts.c.status == "running"))]
        dead = [p for p in running if p.lease_until < now or worker_gone(p.worker or "|0|0|")]
        for part in dead:
            self.give_back(part)
        return len(dead)

    def expire(self, now: float | None = None) -> list[str]:
        """Stop the jobs whose deadline has passed; what is done of them stays."""
        now = time.time() if now is None else now
        late = sa.select(jobs.c.id).where(jobs.c.status.in_(("queued", "running")), jobs.c.deadline < now)
        with self.store.write() as connection:
            found = [str(job) for job in connection.execute(late).scalars()]
            for job in found:
                stop(connection, job, "expired", None)
        return found


def of_class(column: sa.Column[Any], *price_classes: str) -> sa.ColumnElement[Any]:
    return sa.func.coalesce(sa.func.sum(sa.case((ledger.c.price_class.in_(price_classes), column), else_=0)), 0)


def holds(part: Part) -> sa.ColumnElement[bool]:
    return (parts.c.id == part.id) & (parts.c.fence == part.fence) & (parts.c.status == "running")


def stop(connection: sa.Connection, job: str, ends_as: str, error: str | None) -> None:
    open_job = (jobs.c.id == job) & jobs.c.status.in_(("queued", "running"))
    connection.execute(jobs.update().where(open_job).values(status="stopping", ends_as=ends_as, error=error))
    cancel_queued_of_stopping(connection, job)


def cancel_queued_of_stopping(connection: sa.Connection, job: str) -> None:
    stopping = sa.select(jobs.c.id).where(jobs.c.id == job, jobs.c.status == "stopping")
    queued = parts.c.job.in_(stopping) & (parts.c.status == "queued")
    connection.execute(parts.update().where(queued).values(status="cancelled"))
    settle(connection, job)


def settle(connection: sa.Connection, job: str) -> None:
    """End the job if no part of it is left to run."""
    left = sa.select(parts.c.id).where(parts.c.job == job, parts.c.status.in_(UNFINISHED)).exists()
    over = sa.case((jobs.c.status == "stopping", jobs.c.ends_as), else_="completed")
    ended = jobs.update().where(jobs.c.id == job, jobs.c.status.in_(JOB_OPEN), ~left)
    connection.execute(ended.values(status=over, ended_at=time.time()))


def same_request(known: Job, asked: Job) -> Job:
    if known.request != asked.request:
        raise JobError(f"The idempotency key belongs to job {known.id}, which is another request. Take a new key.")
    return known
