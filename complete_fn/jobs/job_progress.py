"""The progress of many jobs is counted in as many statements as that of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from complete_fn.jobs.job import Counts, Job
from complete_fn.store.job_tables import parts
from complete_fn.store.tables import attempts, ledger, ledger_hours, of_class, summed

NOTHING = (0, 0, 0, 0)


def count_progress(connection: sa.Connection, found: Sequence[Job]) -> dict[str, Counts]:
    """The progress of each job by its id, with the committed rows of parts that are not done."""
    names = [job.id for job in found]
    of_parts = {row[0]: row[1:] for row in connection.execute(parts_of(names))}
    billed = {row[0]: row[1:] for row in connection.execute(billed_to(names, {job.tenant for job in found}))}
    begun: dict[str, int] = {}
    for name, most, committed in connection.execute(rows_of_begun_parts(names)):
        begun[name] = begun.get(name, 0) + min(int(most), int(committed))
    counted = {}
    for job in found:
        pieces, done, failed, recomputed = of_parts.get(job.id, NOTHING)
        prompt, cached, answer, cost = billed.get(job.id, NOTHING)
        done += job.nulls + begun.get(job.id, 0)
        counted[job.id] = Counts(done, failed, prompt, cached, answer, cost, pieces, recomputed)
    return counted


def parts_of(names: Sequence[str]) -> sa.Select[Any]:
    """(job, parts, rows and failed rows of its done parts, recomputed tokens), see `Counts`."""
    c = parts.c
    before = sa.func.lag(c.claimant).over(partition_by=c.job, order_by=c.number).label("claimant_before")
    each = sa.select(c.job, c.status, c.rows, c.failed, c.shared, c.claimant, before).where(c.job.in_(names)).subquery()
    done = each.c.status == "done"
    twice = each.c.claimant.is_not(None) & each.c.claimant.is_distinct_from(each.c.claimant_before)
    return sa.select(
        each.c.job,
        sa.func.count(),
        summed(sa.case((done, each.c.rows), else_=0)),
        summed(sa.case((done, each.c.failed), else_=0)),
        summed(sa.case((twice, each.c.shared), else_=0)),
    ).group_by(each.c.job)


def billed_to(names: Sequence[str], tenants: set[str]) -> sa.Select[Any]:
    """(job, prompt tokens, cached tokens, answer tokens, cost in 1e-9)."""
    c = ledger_hours.c
    return (
        sa.select(
            c.job,
            of_class(c.tokens, "input", "cached_input"),
            of_class(c.tokens, "cached_input"),
            of_class(c.tokens, "output"),
            summed(c.cost_nano),
        )
        .where(c.tenant.in_(tenants), c.job.in_(names))
        .group_by(c.job)
    )


def rows_of_begun_parts(names: Sequence[str]) -> sa.Select[Any]:
    """(job, rows, committed rows) of each part that was begun and is not done."""
    c = parts.c
    begun = c.job.in_(names) & (c.status != "done") & c.claim.is_not(None)
    name = c.job + "/" + sa.cast(c.number, sa.String)
    mine = (attempts.c.tenant == c.tenant) & (attempts.c.job == name)
    lines = parts.join(attempts, mine).join(ledger, ledger.c.attempt == attempts.c.id)
    committed = of_class(ledger.c.rows, "input", "duplicate", "reused")
    return sa.select(c.job, c.rows, committed).select_from(lines).where(begun).group_by(c.id, c.job, c.rows)
