"""A rerun asks the rows of a job that have no answer again, in new parts of the same job. Later answers count."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from complete_fn.engines.prices import nano
from complete_fn.errors import InvalidOptionError, JobError
from complete_fn.interrupts import end_if_abandoned
from complete_fn.jobs.job import Job, Part
from complete_fn.service.job_files import (
    PromptGroup,
    ResultWindow,
    details_of,
    read_prompts,
    windows_of,
    write_parts,
    write_windows,
)
from complete_fn.service.sinks import promise
from complete_fn.service.state import ServiceState
from complete_fn.spending.budget import parse_cap, refuse_unpriced
from complete_fn.store.job_tables import jobs, parts


@dataclass
class Again:
    """The work of a rerun.

    Attributes:
        pieces: the new parts, which have so many `bytes`.
        windows: the job's windows with the new parts.
        left: the rows that remain to each old part, by its id.
        damaged: the ids of old parts whose answers are lost.
    """

    pieces: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0
    windows: list[dict[str, Any]] = field(default_factory=list)
    left: dict[int, int] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)


def rerun(state: ServiceState, job: Job, max_cost: Any = None) -> Job:
    """Queue the rows of a finished job that failed, were never run, or whose answers are lost.

    Args:
        max_cost: a new cap for the whole job, with the money that it has spent already; None keeps the job's cap.

    Raises:
        JobError: The job is not over, or every row has an answer.
        InvalidOptionError: `max_cost` is below the job's cap, or the model's prices are not known.
        StorageFullError: The new parts have more bytes than the tenant may keep.
    """
    if not job.over:
        raise JobError(f"Job {job.id} is {job.status}. Wait until it is over, or cancel it.")
    if max_cost is not None:
        refuse_unpriced(state.model(job.model))
    cap = job.max_cost_nano if max_cost is None else nano(parse_cap(max_cost))
    if job.max_cost_nano is not None and cap is not None and cap < job.max_cost_nano:
        raise InvalidOptionError(f"max_cost = {max_cost} is below what the job has. Leave it out, or name more.")
    known = state.jobs.parts(job.id)
    again, first = Again(), max((p.number for p in known), default=-1) + 1
    for window in windows_of(state, job):
        collect(state, job, window, known, again, first)
    if not again.pieces:
        remedy = f" POST /v1/jobs/{job.id}/deliver writes its results to its sink again."
        text = f"Every row of job {job.id} has its answer: there is nothing to run again."
        raise JobError(text + remedy if json.loads(job.request)["sink"] else text)
    end_if_abandoned()
    # The windows are written first: a window may name a part that never comes, but a part in no window would be lost.
    write_windows(state, job.id, again.windows)
    record(state, job, again, first, cap)
    state.queue.announce(Counter(p["model"] for p in again.pieces))
    return state.jobs.get(job.tenant, job.id)


def collect(state: ServiceState, job: Job, window: ResultWindow, known: list[Part], again: Again, first: int) -> None:
    """Add the rows of a window that have no answer, grouped by the model and options of their old parts."""
    details = details_of(state, job, window, known, again.damaged)
    failed = pc.is_valid(pc.struct_field(details, [1]))
    missing = pc.or_(pc.is_null(details), pc.fill_null(failed, False)).to_numpy(zero_copy_only=False)
    owner = np.full(window.rows, -1, np.int64)
    asked: dict[int, tuple[Any, Any]] = {}
    here = [part for part in known if part.number in window.parts]
    for part in here:
        end_if_abandoned()
        table = read_prompts(state, part)
        rows = table.column("row").to_numpy() - window.first
        owner[rows] = part.number
        asked[part.number] = rows, table.column("prompt")
    numbers = list(window.parts)
    for part in here:
        rows, prompts = asked[part.number]
        mine = owner[rows] == part.number
        chosen = mine & missing[rows]
        again.left[part.id] = int((mine & ~missing[rows]).sum())
        if chosen.any():
            model = state.model(part.model)
            group = PromptGroup(
                model, json.loads(part.options), rows[chosen] + window.first, prompts.filter(pa.array(chosen))
            )
            low = first + len(again.pieces)
            made, size = write_parts(state, job, low, [group])
            again.pieces += made
            again.bytes += size
            numbers += range(low, low + len(made))
    again.windows.append({"rows": window.rows, "parts": numbers})


def record(state: ServiceState, job: Job, again: Again, first: int, cap: int | None) -> None:
    """In one transaction, queue the job again, add its new parts, and leave each old part the rows that it answered.

    Raises:
        JobError: Another caller has run the job again or deleted it meanwhile.
    """
    over = (jobs.c.id == job.id) & (jobs.c.status == job.status)
    fresh = {
        "status": "queued",
        "ends_as": None,
        "error": None,
        "ended_at": None,
        "deadline": None,
        "max_cost_nano": cap,
        "bytes": jobs.c.bytes + again.bytes,
    }
    rows = [
        {"job": job.id, "tenant": job.tenant, "number": first + n, "status": "queued", **piece}
        for n, piece in enumerate(again.pieces)
    ]
    newest = sa.select(sa.func.max(parts.c.number)).where(parts.c.job == job.id)
    with state.store.write() as connection:
        if connection.execute(jobs.update().where(over).values(fresh)).rowcount == 0 or (
            connection.execute(newest).scalar() != first - 1
        ):
            raise JobError(f"Job {job.id} has changed meanwhile. Look at it again.")
        for part, left in again.left.items():
            lost = {"result": None} if part in again.damaged else {}
            connection.execute(parts.update().where(parts.c.id == part).values(rows=left, failed=0, **lost))
        connection.execute(parts.insert(), rows)
        state.quota.refuse_excess(connection, job.tenant, again.bytes)
        if json.loads(job.request).get("sink"):
            promise(connection, job)
