"""A delivery writes a job's results to its sink: by upsert into a table, or to a file under an allowed root.

However often it is tried, the sink has each row once. A delivery has a named claim and a lease, as a part has. If a
writer is killed or late, the next one writes the same rows under the same keys, or replaces the file as a whole.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from complete_fn.errors import CompleteError, JobError, RequestError
from complete_fn.jobs.job import JOB_OPEN, Job
from complete_fn.logs import for_tenant, log_failure
from complete_fn.rows.result_tables import result_columns
from complete_fn.rows.writers import written_to
from complete_fn.service.results import lines_schema, result_windows
from complete_fn.service.sinks import COLUMNS, ROW_NUMBER, Delivery, opened_table, sink_place
from complete_fn.service.state import ServiceState
from complete_fn.store.job_tables import deliveries, jobs

LEASE_SECONDS = 60.0
# The pause before a delivery is tried again doubles with each try. A sink that refuses the results will go on to do so;
# one that is away is waited for, for six hours in all.
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 10.0, 1800.0
TRIES, AWAY_TRIES = 3, 20
LOOK_SECONDS, PAUSE_SECONDS = 0.5, 2.0


class LeaseLost(Exception):
    """Another worker has claimed this delivery."""


def claim(state: ServiceState) -> Delivery | None:
    """Claim the next delivery of a job that is over; None if there is none."""
    now = state.store.now()
    free = deliveries.c.status.in_(("waiting", "writing")) & (deliveries.c.lease_until < now)
    over = jobs.c.status.notin_(JOB_OPEN)
    first = sa.select(deliveries.c.job).join(jobs, jobs.c.id == deliveries.c.job).where(free, over)
    with state.store.read() as connection:
        name = connection.execute(first.order_by(jobs.c.ended_at).limit(1)).scalar()
    if name is None:
        return None
    taken = {"status": "writing", "lease_until": now + LEASE_SECONDS, "claim": secrets.token_hex(8), "rows": 0}
    with state.store.write() as connection:
        mine = deliveries.update().where(deliveries.c.job == name, free).values(taken).returning(*COLUMNS)
        row = connection.execute(mine).first()
    return None if row is None else Delivery(*row)


def move(state: ServiceState, held: Delivery, **values: Any) -> None:
    """Change the delivery's record.

    Raises:
        LeaseLost: Another worker has claimed the delivery since.
    """
    mine = (deliveries.c.job == held.job) & (deliveries.c.claim == held.claim)
    with state.store.write() as connection:
        if connection.execute(deliveries.update().where(mine).values(values)).rowcount == 0:
            raise LeaseLost


# -- the work --------------------------------------------------------------------------------------------------------


def deliver_next(state: ServiceState) -> bool:
    """Write the results of one job that is over to its sink; False if there is none."""
    held = claim(state)
    if held is None:
        return False
    try:
        write(state, held, state.jobs.get(held.tenant, held.job))
        move(state, held, status="written", error=None)
    except LeaseLost:
        pass
    except Exception as error:
        failed(state, held, error)
    return True


def keep_delivering(state: ServiceState, closing: threading.Event) -> None:
    """Deliver results until `closing` is set. API processes and workers both do this, as either may run alone."""
    while not closing.is_set():
        try:
            if state.store.is_outdated or not deliver_next(state):
                closing.wait(LOOK_SECONDS)
        except Exception as error:
            log_failure("delivering results", error)
            closing.wait(PAUSE_SECONDS)


def failed(state: ServiceState, held: Delivery, error: Exception) -> None:
    """Note a failure: the delivery is tried again later, each time after a longer wait, and fails at the last try."""
    what, pause = f"delivery of {held.job}", next_try(held, error)
    if isinstance(error, CompleteError):
        text = str(for_tenant(what, error, held.tenant)).splitlines()[0]
    else:
        log_failure(what, error)
        text = f"The service failed to write ({type(error).__name__}); its log says why."
    if pause is None:
        text += f" POST /v1/jobs/{held.job}/deliver, or `complete-fn jobs deliver {held.job}`, tries again."
    status = "failed" if pause is None else "waiting"
    try:
        later = state.store.now() + (pause or 0.0)
        move(state, held, status=status, error=text, tries=held.tries + 1, lease_until=later)
    except (LeaseLost, CompleteError):
        return


def next_try(held: Delivery, error: Exception) -> float | None:
    """The seconds until the delivery is tried again; None if it is not."""
    refused = isinstance(error, RequestError | JobError) and not error.retryable
    if held.tries + 1 >= (TRIES if refused else AWAY_TRIES):
        return None
    return min(RETRY_SECONDS * 2.0**held.tries, LONGEST_RETRY_SECONDS)


def write(state: ServiceState, held: Delivery, job: Job) -> None:
    sink = json.loads(job.request)["sink"]
    if "uri" in sink:
        write_file(state, held, job, sink)
    else:
        write_table(state, held, job, sink)


def write_file(state: ServiceState, held: Delivery, job: Job, sink: Mapping[str, Any]) -> None:
    found, place = sink_place(state, job.tenant, sink)
    schema = None if place.format == "jsonl" else lines_schema(state, job)
    count = 0
    with found.writing() as target:
        with written_to(target, place, schema) as writer:
            for rows, new, _ in result_windows(state, job, True, job.status != "completed"):
                writer.write(rows, new)
                count += rows.count
                move(state, held, rows=count, lease_until=state.store.now() + LEASE_SECONDS)
        target.flush()


def write_table(state: ServiceState, held: Delivery, job: Job, sink: Mapping[str, Any]) -> None:
    column, key = json.loads(job.request)["column"], sink.get("key") or ROW_NUMBER
    count = 0
    with opened_table(state, job.tenant, sink) as database:
        for rows, new, numbers in result_windows(state, job, True, job.status != "completed"):
            keys = rows.column(key) if sink.get("key") else numbers
            database.upsert(sink["table"], key, pa.table({key: keys, **result_columns(column, new, True)}))
            count += rows.count
            move(state, held, rows=count, lease_until=state.store.now() + LEASE_SECONDS)
