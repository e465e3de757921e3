"""Retention deletes jobs, uploads and call-outs whose time is over. Ledger lines stay; they contain no text."""

from __future__ import annotations

import sqlalchemy as sa

from complete_fn.jobs.job import JOB_OPEN, Job
from complete_fn.jobs.uploads import DAY
from complete_fn.service.call_out_batches import kept
from complete_fn.service.sinks import withdraw
from complete_fn.service.state import ServiceState
from complete_fn.store.job_tables import call_outs, jobs

MOST_AT_ONCE = 100  # jobs that one round of upkeep deletes


def delete_job(state: ServiceState, job: Job) -> None:
    """Delete a job's record, input, results and the answers that it computed.

    Raises:
        JobError: The job is not over.
    """
    if job.over:  # files first: if the deletion breaks off here, the job's record is left and it can be repeated
        state.storage.delete_folder(state.job_key(job.id))
        withdraw(state, job.id)
    state.jobs.delete(job)


def expire(state: ServiceState) -> int:
    """Delete jobs, uploads and call-outs that are too old; returns the number of jobs and files deleted."""
    now = state.store.now()
    before = now - state.settings.retention_days * DAY
    late = sa.select(jobs.c.tenant, jobs.c.id).where(jobs.c.status.notin_(JOB_OPEN), jobs.c.ended_at < before)
    with state.store.write() as connection:
        connection.execute(call_outs.delete().where(~kept(now)))
        found = connection.execute(late.limit(MOST_AT_ONCE)).all()
    for tenant, name in found:
        delete_job(state, state.jobs.get(tenant, name))
    return len(found) + state.uploads.expire()
