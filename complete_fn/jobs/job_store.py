"""`JobStore` makes, lists, counts, stops and deletes jobs for their callers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import sqlalchemy as sa

from complete_fn.errors import JobError, NotFoundError
from complete_fn.jobs.job import JOB_OPEN, Counts, Job, Part, refuse_move
from complete_fn.jobs.job_progress import count_progress
from complete_fn.jobs.list_filters import EVERY_JOB, JobFilter
from complete_fn.jobs.storage_quota import StorageQuota
from complete_fn.store.job_tables import jobs, parts
from complete_fn.store.store import Store
from complete_fn.store.tables import answers, attempts, budgets
from complete_fn.store.transactions import insert_into, retried

JOB = [jobs.c[f.name] for f in fields(Job)]
PART = [parts.c[f.name] for f in fields(Part)]
UNFINISHED = ("queued", "running")


class JobStore:
    """The jobs of one store. Each step is one transaction. Workers claim the jobs' parts from `PartQueue`."""

    def __init__(self, store: Store, quota: StorageQuota | None = None) -> None:
        self.store, self.quota = store, quota

    @retried
    def create(self, job: Job, pieces: Sequence[dict[str, Any]]) -> Job:
        """Insert the job and its parts. If its idempotency key is known, return the job that has the key.

        Args:
            pieces: `model`, `options`, `rows`, `tokens` and `shared` of each part, in order.

        Raises:
            JobError: The idempotency key belongs to another request.
            StorageFullError: The job has more bytes than its tenant may keep.
        """
        with self.store.write() as connection:
            known = same_job(connection, job)
            if known is not None:
                return same_request(known, job)
            rows = [
                {"job": job.id, "tenant": job.tenant, "number": n, "status": "queued", **piece}
                for n, piece in enumerate(pieces)
            ]
            if rows:
                connection.execute(parts.insert(), rows)
            if self.quota is not None:
                self.quota.refuse_excess(connection, job.tenant, job.bytes)
            settle_job(connection, job.id, self.store.now())
            return Job(*connection.execute(sa.select(*JOB).where(jobs.c.id == job.id)).one())

    @retried
    def get(self, tenant: str, job: str, kind: str | None = None) -> Job:
        """The tenant's job of this id.

        Raises:
            NotFoundError: The tenant has no such job.
        """
        with self.store.read() as connection:
            row = connection.execute(sa.select(*JOB).where(jobs.c.id == job, jobs.c.tenant == tenant)).first()
        if row is None or kind not in (None, row.kind):
            raise NotFoundError(f"There is no {'batch' if kind == 'batch' else 'job'} {job!r}.")
        return Job(*row)

    @retried
    def newest(self, tenant: str, kind: str, limit: int, after: str | None, which: JobFilter = EVERY_JOB) -> list[Job]:
        """The tenant's jobs, newest first; with `after`, only jobs older than that job."""
        chosen = sa.select(*JOB).where(jobs.c.tenant == tenant, jobs.c.kind == kind, *which.conditions())
        if after is not None:
            last = self.get(tenant, after)
            chosen = chosen.where(sa.tuple_(jobs.c.created_at, jobs.c.id) < sa.tuple_(last.created_at, last.id))
        last_first = chosen.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        with self.store.read() as connection:
            return [Job(*row) for row in connection.execute(last_first)]

    @retried
    def parts(self, job: str) -> list[Part]:
        with self.store.read() as connection:
            return [Part(*r) for r in connection.execute(sa.select(*PART).where(parts.c.job == job).order_by("number"))]

    @retried
    def replace_result(self, part: Part, result: str) -> None:
        """Name another file for the result of a part whose file was damaged."""
        same = (parts.c.id == part.id) & (parts.c.result == part.result)
        with self.store.write() as connection:
            connection.execute(parts.update().where(same).values(result=result))

    @retried
    def counts(self, job: Job) -> Counts:
        return self.progress([job])[job.id]

    @retried
    def progress(self, found: Sequence[Job]) -> dict[str, Counts]:
        """The progress of each job by its id, with the committed rows of running parts."""
        with self.store.read() as connection:
            return count_progress(connection, found)

    @retried
    def stop(self, job: Job, ends_as: str, error: str | None = None) -> Job:
        """Stop the job: no part is begun any more, and the job ends once no part runs.

        Raises:
            JobError: The job is over already.
        """
        refuse_move(job, "stopping" if job.status != "stopping" else ends_as)
        with self.store.write() as connection:
            stop_job(connection, job.id, self.store.now(), ends_as, error)
        return self.get(job.tenant, job.id)

    @retried
    def delete(self, job: Job) -> None:
        """Delete the job, its parts and the answers that it computed. Its ledger lines stay; they contain no text.

        Raises:
            JobError: The job is not over.
        """
        if not job.over:
            raise JobError(f"Job {job.id} is {job.status}. Cancel it first.")
        of_job = (attempts.c.job >= f"{job.id}/") & (attempts.c.job < f"{job.id}0")
        with self.store.write() as connection:
            made = sa.select(attempts.c.id).where(of_job)
            connection.execute(answers.delete().where(answers.c.tenant == job.tenant, answers.c.attempt.in_(made)))
            connection.execute(parts.delete().where(parts.c.job == job.id))
            cap = (budgets.c.tenant == job.tenant) & (budgets.c.name == f"job:{job.id}")
            connection.execute(budgets.delete().where(cap))
            connection.execute(jobs.delete().where(jobs.c.id == job.id))

    @retried
    def expire(self) -> list[str]:
        """Stop the jobs whose deadline has passed; their finished rows are kept. Returns the ids of these jobs."""
        now = self.store.now()
        late = sa.select(jobs.c.id).where(jobs.c.status.in_(("queued", "running")), jobs.c.deadline < now)
        with self.store.write() as connection:
            found = [str(job) for job in connection.execute(late).scalars()]
            for job in found:
                stop_job(connection, job, now, "expired")
        return found


def stop_job(connection: sa.Connection, job: str, now: float, ends_as: str, error: str | None = None) -> None:
    open_job = (jobs.c.id == job) & jobs.c.status.in_(("queued", "running"))
    if connection.execute(
        jobs.update().where(open_job).values(status="stopping", ends_as=ends_as, error=error)
    ).rowcount:
        waiting = (parts.c.job == job) & (parts.c.status == "queued")
        connection.execute(parts.update().where(waiting).values(not_before=0.0))
    cancel_queued_of_stopping(connection, job, now)


def cancel_queued_of_stopping(connection: sa.Connection, job: str, now: float) -> None:
    stopping = sa.select(jobs.c.id).where(jobs.c.id == job, jobs.c.status == "stopping")
    queued = parts.c.job.in_(stopping) & (parts.c.status == "queued") & parts.c.claim.is_(None)  # see `PartQueue`
    connection.execute(parts.update().where(queued).values(status="cancelled"))
    settle_job(connection, job, now)


def settle_job(connection: sa.Connection, job: str, now: float) -> None:
    """End the job if no part of it is left to run. The job's row is locked first, as two last parts may end at once."""
    connection.execute(sa.select(jobs.c.id).where(jobs.c.id == job).with_for_update())
    left = sa.select(parts.c.id).where(parts.c.job == job, parts.c.status.in_(UNFINISHED)).exists()
    over = sa.case((jobs.c.status == "stopping", jobs.c.ends_as), else_="completed")
    ended = jobs.update().where(jobs.c.id == job, jobs.c.status.in_(JOB_OPEN), ~left)
    connection.execute(ended.values(status=over, ended_at=now))


def same_job(connection: sa.Connection, job: Job) -> Job | None:
    """Insert the job; returns None, or the job that is there already with the same id or idempotency key."""
    made = insert_into(connection, jobs).values(asdict(job)).on_conflict_do_nothing().returning(jobs.c.id)
    if connection.execute(made).first() is not None:
        return None
    same = jobs.c.id == job.id
    if job.idempotency_key is not None:
        same |= (jobs.c.tenant == job.tenant) & (jobs.c.idempotency_key == job.idempotency_key)
    return Job(*connection.execute(sa.select(*JOB).where(same)).one())


def same_request(known: Job, asked: Job) -> Job:
    if known.request != asked.request:
        raise JobError(f"The idempotency key belongs to job {known.id}, which is another request. Take a new key.")
    return known
