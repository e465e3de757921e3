"""Jobs and parts in the store: claims with a lease and a fence, commits, stops. Each step is one transaction."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

import sqlalchemy as sa

from complete_fn.errors import JobError, NotFoundError
from complete_fn.host import here, process_started
from complete_fn.jobs.job import JOB_OPEN, LEASE_SECONDS, TRIES, Counts, Job, Part, refuse_move
from complete_fn.store.job_tables import jobs, parts, tenants
from complete_fn.store.store import Store, gone
from complete_fn.store.tables import answers, attempts, budgets, ledger, of_class, summed
from complete_fn.store.transactions import insert_into, retried

JOB = [jobs.c[f.name] for f in fields(Job)]
PART = [parts.c[f.name] for f in fields(Part)]
UNFINISHED = ("queued", "running")
Wanted = Callable[[Any], sa.ColumnElement[bool]]  # of the column of models
DEATHS = 10  # claims of a part that were lost in a row without an answer
DEADLY = f"{DEATHS} workers in a row died on a part of the job before they answered a row of it."
SHARE_SECONDS = 600.0  # what a tenant was served longer ago does not count against it


def worker_name(number: int) -> str:
    """Names a worker so that others on its machine can tell when its process is gone."""
    pid = os.getpid()
    return f"{here()}|{pid}|{process_started(pid) or 0.0}|{number}"


def worker_gone(worker: str) -> bool:
    host, pid, started, _ = worker.split("|")
    return host == here() and gone(int(pid), float(started))


class JobStore:
    """The jobs of one state file."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.swept = 0  # parts whose lease ran out, in this process's life

    # -- what callers do -----------------------------------------------------------------------------------------

    @retried
    def create(self, job: Job, pieces: Sequence[dict[str, Any]]) -> Job:
        """The job with its parts; with an idempotency key known already, the job that has it.

        Args:
            pieces: `model`, `options`, `rows`, `tokens` and `shared` of each part, in order.

        Raises:
            JobError: the key belongs to another request.
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
            settle(connection, job.id)
            return Job(*connection.execute(sa.select(*JOB).where(jobs.c.id == job.id)).one())

    @retried
    def get(self, tenant: str, job: str, kind: str | None = None) -> Job:
        """Raises:
        NotFoundError: the tenant has no such job.
        """
        with self.store.read() as connection:
            row = connection.execute(sa.select(*JOB).where(jobs.c.id == job, jobs.c.tenant == tenant)).first()
        if row is None or kind not in (None, row.kind):
            raise NotFoundError(f"There is no {'batch' if kind == 'batch' else 'job'} {job!r}.")
        return Job(*row)

    @retried
    def newest(self, tenant: str, kind: str, limit: int, after: str | None) -> list[Job]:
        """The tenant's jobs, newest first, from behind the job `after` on."""
        chosen = sa.select(*JOB).where(jobs.c.tenant == tenant, jobs.c.kind == kind)
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
    def counts(self, job: Job) -> Counts:
        """How far the job is, rows of running parts included as they are committed."""
        of_job = (attempts.c.job >= f"{job.id}/") & (attempts.c.job < f"{job.id}0")  # "0" follows "/"
        lines = ledger.join(attempts, ledger.c.attempt == attempts.c.id)
        sums = sa.select(
            of_class(ledger.c.tokens, "input", "cached_input"),
            of_class(ledger.c.tokens, "cached_input"),
            of_class(ledger.c.tokens, "output"),
            summed(ledger.c.cost_nano),
        )
        live = sa.select(attempts.c.job, of_class(ledger.c.rows, "input", "duplicate", "reused"))
        with self.store.read() as connection:
            tokens = connection.execute(sums.select_from(lines).where(of_job)).one()
            rows = {r[0]: r[1] for r in connection.execute(live.select_from(lines).where(of_job).group_by("job"))}
        found = self.parts(job.id)
        done = job.nulls + sum(p.rows if p.status == "done" else min(p.rows, rows.get(p.name, 0)) for p in found)
        failed = sum(p.failed for p in found if p.status == "done")
        return Counts(done, failed, *tokens, len(found), recomputed_tokens(found))

    @retried
    def stop(self, job: Job, ends_as: str, error: str | None = None) -> Job:
        """Nothing more of the job is begun; it ends once its running parts have let go.

        Raises:
            JobError: it is over already.
        """
        refuse_move(job, "stopping" if job.status != "stopping" else ends_as)
        with self.store.write() as connection:
            stop(connection, job.id, ends_as, error)
        return self.get(job.tenant, job.id)

    @retried
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
            cap = (budgets.c.tenant == job.tenant) & (budgets.c.name == f"job:{job.id}")
            connection.execute(budgets.delete().where(cap))
            connection.execute(jobs.delete().where(jobs.c.id == job.id))

    # -- what workers do -----------------------------------------------------------------------------------------

    def claim(self, worker: str, now: float | None = None, model: str | None = None) -> Part | None:
        """The next part, leased to `worker`, in one statement that skips what others are claiming.

        It is of the tenant that was served least in the last minutes: estimated tokens over the tenant's weight; then
        of the one served longest ago; of its jobs by priority, then age. Of a job's parts, it is the one behind a part
        that this process had, whose engine is warm for it; else one behind which no other process is, the one that
        shares least with the part before it first; else what another would have gone on with.

        Args:
            model: only parts of this model.
        """

        def wanted(c: Any) -> sa.ColumnElement[bool]:
            return sa.true() if model is None else c == model

        return self.claim_at(worker, time.time() if now is None else now, wanted, ("queued", "running"))

    def claim_stopped(self, worker: str, now: float | None = None, not_of: Collection[str] = ()) -> Part | None:
        """A part that was begun and given back, and whose job is to stop: what it committed is to be its result.

        Args:
            not_of: models whose parts are left to others.
        """
        return self.claim_at(worker, time.time() if now is None else now, lambda c: c.not_in(not_of), ("stopping",))

    @retried
    def claim_at(self, worker: str, now: float, wanted: Wanted, of_jobs: Sequence[str]) -> Part | None:
        """`worker` claims one part at a time, so that a repeat finds what it claimed at `now`."""
        before = (parts.c.worker == worker) & (parts.c.claimed_at == now) & (parts.c.status == "running")
        until = max(now, time.time()) + LEASE_SECONDS  # a repeat may come long after
        leased = {"status": "running", "worker": worker, "lease_until": until, "claimed_at": now}
        leased["claimant"] = process = worker.rpartition("|")[0]
        first = next_part(now, process, wanted, of_jobs).scalar_subquery()
        claim = parts.update().where(parts.c.id == first, parts.c.status == "queued")
        with self.store.write() as connection:
            row = connection.execute(sa.select(*PART).where(before)).first()
            if row is not None:
                return Part(*row)
            row = connection.execute(claim.values(**leased, fence=parts.c.fence + 1).returning(*PART)).first()
            if row is None:
                return None
            begun = jobs.update().where(jobs.c.id == row.job, jobs.c.status == "queued")
            connection.execute(begun.values(status="running", started_at=now))
        return Part(*row)

    @retried
    def waiting(self) -> bool:
        with self.store.read() as connection:
            return (
                connection.execute(sa.select(parts.c.id).where(parts.c.status == "queued").limit(1)).first() is not None
            )

    @retried
    def renew(self, held: Iterable[Part], now: float | None = None) -> None:
        """Another lease for the parts whose fence is still theirs."""
        until = (time.time() if now is None else now) + LEASE_SECONDS
        with self.store.write() as connection:
            for part in sorted(held, key=lambda p: p.id):
                connection.execute(parts.update().where(holds(part)).values(lease_until=until))

    @retried
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

    @retried
    def finish(self, part: Part, status: str, result: str, failed: int) -> bool:
        """Commit the part's result; False if the lease was lost, and nothing was committed."""
        values = {"status": status, "result": result, "failed": failed, "worker": None}
        with self.store.write() as connection:
            if connection.execute(parts.update().where(holds(part)).values(values)).rowcount == 0:
                again = sa.select(parts.c.id).where(of_claim(part), parts.c.status == status, parts.c.result == result)
                return connection.execute(again).first() is not None  # the answer to the first commit was lost
            settle(connection, part.job)
        return True

    @retried
    def give_back(
        self, part: Part, delay: float = 0.0, error: str | None = None, tries: int = TRIES, salvage: bool = False
    ) -> None:
        """The part is to be run again. With an `error` that counts as a try, and the last of `tries` fails the job."""
        with self.store.write() as connection:
            give_back(connection, part, delay, error, tries, salvage)

    @retried
    def fail(self, part: Part, error: str, salvage: bool = False) -> None:
        """The part cannot be run; its job fails. What it committed is to be its result, see `claim_stopped`.

        Args:
            salvage: that is what could not be done.
        """
        with self.store.write() as connection:
            fail(connection, part, error, salvage)

    def sweep(self, now: float | None = None) -> int:
        """Parts whose lease has run out, or whose worker's process is gone, are queued again; returns how many."""
        now = time.time() if now is None else now
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
        """As `give_back`, for a holder that seems dead, unless it has renewed its lease or somebody was here before."""
        same_lease = holds(part) & (parts.c.lease_until == part.lease_until)
        with self.store.write() as connection:
            if connection.execute(sa.select(parts.c.id).where(same_lease).with_for_update()).first() is None:
                return False
            self.store.lose(connection, part.tenant, part.name)  # if it only seemed dead, it must not go on paying
            salvage = connection.execute(sa.select(jobs.c.status).where(jobs.c.id == part.job)).scalar() == "stopping"
            give_back(connection, part, 0.0, error, 1, salvage)
        return True

    def deadly(self, part: Part) -> bool:
        """Whether the part is lost again and again without a single answer: whoever takes it dies of it."""
        mine = (attempts.c.tenant == part.tenant) & (attempts.c.job == part.name)
        answered = sa.exists().where(ledger.c.attempt == attempts.c.id, ledger.c.price_class == "input")
        newest = sa.select(attempts.c.status, answered).where(mine).order_by(attempts.c.id.desc()).limit(DEATHS)
        with self.store.read() as connection:
            rows = connection.execute(newest).all()
        return len(rows) == DEATHS and all(s in ("lost", "running") and not answers for s, answers in rows)

    @retried
    def expire(self, now: float | None = None) -> list[str]:
        """Stop the jobs whose deadline has passed; what is done of them stays."""
        now = time.time() if now is None else now
        late = sa.select(jobs.c.id).where(jobs.c.status.in_(("queued", "running")), jobs.c.deadline < now)
        with self.store.write() as connection:
            found = [str(job) for job in connection.execute(late).scalars()]
            for job in found:
                stop(connection, job, "expired", None)
        return found


def of_claim(part: Part) -> sa.ColumnElement[bool]:
    return (parts.c.id == part.id) & (parts.c.fence == part.fence)


def holds(part: Part) -> sa.ColumnElement[bool]:
    return of_claim(part) & (parts.c.status == "running")


def next_part(now: float, process: str, wanted: Wanted, of_jobs: Sequence[str]) -> sa.Select[Any]:
    """The id of the part to claim; its row stays locked, and rows that others have locked are passed over."""
    waiting, served, before = parts.alias("waiting"), parts.alias("served"), parts.alias("before")
    lately = (
        sa.select(served.c.tenant, summed(served.c.tokens).label("tokens"))
        .where(served.c.claimed_at > now - SHARE_SECONDS)
        .group_by(served.c.tenant)
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


def recomputed_tokens(of_job: Sequence[Part]) -> int:
    """What the cuts between parts have cost, in order of their numbers: shared with a part of another process."""
    behind = zip([None, *(p.claimant for p in of_job)], of_job, strict=False)
    return sum(p.shared for before, p in behind if p.claimant is not None and p.claimant != before)


def give_back(
    connection: sa.Connection, part: Part, delay: float, error: str | None, tries: int, salvage: bool
) -> None:
    tried = part.tries + (error is not None)
    if error is not None and tried >= tries:
        fail(connection, part, error, salvage)
        return
    again = {"status": "queued", "worker": None, "tries": tried, "not_before": time.time() + delay}
    connection.execute(parts.update().where(holds(part)).values(again))
    cancel_queued_of_stopping(connection, part.job)


def fail(connection: sa.Connection, part: Part, error: str, salvage: bool) -> None:
    to_salvage = {"status": "queued", "worker": None, "tries": 0, "not_before": 0.0}
    ended = {"status": "failed"} if salvage else to_salvage
    if connection.execute(parts.update().where(holds(part)).values(ended)).rowcount:
        stop(connection, part.job, "failed", error)


def stop(connection: sa.Connection, job: str, ends_as: str, error: str | None) -> None:
    open_job = (jobs.c.id == job) & jobs.c.status.in_(("queued", "running"))
    if connection.execute(
        jobs.update().where(open_job).values(status="stopping", ends_as=ends_as, error=error)
    ).rowcount:
        waiting = (parts.c.job == job) & (parts.c.status == "queued")
        connection.execute(parts.update().where(waiting).values(not_before=0.0))
    cancel_queued_of_stopping(connection, job)


def cancel_queued_of_stopping(connection: sa.Connection, job: str) -> None:
    stopping = sa.select(jobs.c.id).where(jobs.c.id == job, jobs.c.status == "stopping")
    queued = parts.c.job.in_(stopping) & (parts.c.status == "queued") & (parts.c.fence == 0)  # see `claim_stopped`
    connection.execute(parts.update().where(queued).values(status="cancelled"))
    settle(connection, job)


def settle(connection: sa.Connection, job: str) -> None:
    """End the job if no part of it is left to run. Its row is locked first: two last parts may end at once."""
    connection.execute(sa.select(jobs.c.id).where(jobs.c.id == job).with_for_update())
    left = sa.select(parts.c.id).where(parts.c.job == job, parts.c.status.in_(UNFINISHED)).exists()
    over = sa.case((jobs.c.status == "stopping", jobs.c.ends_as), else_="completed")
    ended = jobs.update().where(jobs.c.id == job, jobs.c.status.in_(JOB_OPEN), ~left)
    connection.execute(ended.values(status=over, ended_at=time.time()))


def same_job(connection: sa.Connection, job: Job) -> Job | None:
    """None if the job is now inserted; else the one that was there, by its id or its idempotency key."""
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
