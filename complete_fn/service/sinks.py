"""A sink is the place for a job's results: a table of a registered connection, or a file under an allowed root."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from complete_fn.errors import DatabaseAwayError, InputError, JobError
from complete_fn.execution.rehearsal import rehearse
from complete_fn.jobs.job import Job
from complete_fn.rows.allowed_paths import Allowed, allowed
from complete_fn.rows.databases import RowDatabase
from complete_fn.rows.formats import COMPRESSIONS, Rows, TablePlace, escaping, place_of
from complete_fn.rows.result_tables import KeysSeen, refuse_name
from complete_fn.service.state import ServiceState
from complete_fn.store.job_tables import deliveries

ROW_NUMBER = "row"  # the key column of a sink that names no key: the row's number in the job, from 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """The results of one job on their way to its sink, with `rows` written so far.

    `status` is waiting, writing, written or failed.
    """

    job: str
    tenant: str
    status: str
    rows: int
    error: str | None
    claim: str | None
    tries: int


COLUMNS = [deliveries.c[f.name] for f in fields(Delivery)]


class SinkCheck:
    """Refuses a sink that cannot take a job's results, before the job's rows are paid for.

    Args:
        column: the name of the answers.

    Raises:
        RequestError: The tenant may not write there, or the file or its folder cannot be written.
        StorageError: The sink's root is away.
    """

    def __init__(self, state: ServiceState, tenant: str, sink: Mapping[str, Any], column: str) -> None:
        self.sink, self.column = sink, column
        self.open = partial(opened_table, state, tenant, sink)
        self.keys: Any = None  # the first row's key
        self.is_tried = "uri" in sink
        if self.is_tried:
            found, _ = sink_place(state, tenant, sink)
            found.refuse_unwritable()
            return
        refuse_name(sink["table"])
        with self.open() as database:
            self.seen = KeysSeen(database.longest_key)

    def refuse(self, rows: Rows) -> None:
        """Refuse the job's next rows, if the sink cannot take them. At the first rows the table itself is tried.

        Raises:
            InputError: The key is no column, or does not tell these rows and those before apart; or see `refuse_table`.
        """
        key = self.sink.get("key")
        if key is not None:
            if key not in rows.names:
                raise InputError(f"The sink's key {key!r} is no column. Columns: {', '.join(rows.names)}.")
            self.seen.add(rows.column(key), key)
        if self.keys is None and rows.count:
            self.keys = pa.array([0]) if key is None else rows.column(key)[:1]
            with suppress(DatabaseAwayError):  # a DuckDB file is held while the job's own rows are read from it
                self.refuse_table()

    def refuse_table(self) -> None:
        """Try the table out, unless it was tried or there are no rows.

        Raises:
            InputError: The table has other columns, types or rights than the results need.
            DatabaseAwayError: The database does not answer.
        """
        if not self.is_tried and self.keys is not None:
            with self.open() as database:
                key = self.sink.get("key") or ROW_NUMBER
                rehearse(database, self.sink["table"], key, self.keys, self.column, True)
            self.is_tried = True


@contextmanager
def opened_table(state: ServiceState, tenant: str, sink: Mapping[str, Any]) -> Iterator[RowDatabase]:
    """The database of a sink that is a table.

    Raises:
        RequestError: The tenant has no such connection, or may not write there.
    """
    connection = state.connections.get(tenant, sink["connection"], writable=True)
    database = state.connections.writer(connection, state.settings.sql_seconds)
    try:
        yield database
    finally:
        database.close()


def sink_place(state: ServiceState, tenant: str, sink: Mapping[str, Any]) -> tuple[Allowed, TablePlace]:
    found = allowed(sink["uri"], state.settings.sinks, tenant, "write")
    place = place_of(sink["uri"])
    if place.compression is not None:
        raise InputError(f"A sink's file is not compressed as a whole ({', '.join(COMPRESSIONS)}); take .parquet.")
    return found, escaping(place, sink.get("escape_formulas", False))


def promise(connection: sa.Connection, job: Job) -> None:
    """Note that the job's results must be delivered once it is over, or once more.

    This ends the claim of a writer that still delivers the previous results.
    """
    c = deliveries.c
    fresh = {"status": "waiting", "rows": 0, "error": None, "tries": 0, "lease_until": 0.0, "claim": None}
    again = deliveries.update().where(c.job == job.id).values(fresh)
    if connection.execute(again).rowcount == 0:
        connection.execute(deliveries.insert().values(job=job.id, tenant=job.tenant, **fresh))


def deliver_again(state: ServiceState, job: Job) -> None:
    """Write a finished job's results to its sink once more, whatever became of them before.

    Raises:
        JobError: The job is not over, or has no sink.
    """
    if not job.over:
        raise JobError(f"Job {job.id} is {job.status}. Its results are delivered once it is over.")
    if not json.loads(job.request).get("sink"):
        raise JobError(f"Job {job.id} has no sink. Fetch its results: GET /v1/jobs/{job.id}/results.")
    with state.store.write() as connection:
        promise(connection, job)


def withdraw(state: ServiceState, job: str) -> None:
    with state.store.write() as connection:
        connection.execute(deliveries.delete().where(deliveries.c.job == job))


def deliveries_of(state: ServiceState, jobs: Sequence[Job]) -> dict[str, Delivery]:
    """The deliveries of those jobs that have a sink, by the job's id."""
    mine = deliveries.c.job.in_([job.id for job in jobs])
    with state.store.read() as connection:
        found = [Delivery(*row) for row in connection.execute(sa.select(*COLUMNS).where(mine))]
    return {delivery.job: delivery for delivery in found}
