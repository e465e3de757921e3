"""A sink is the place for a job's results: a table of a registered connection, or a file under an allowed root."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import sqlalchemy as sa

from complete_fn.errors import InputError
from complete_fn.jobs.job import Job
from complete_fn.rows.allowed_paths import Allowed, allowed
from complete_fn.rows.formats import COMPRESSIONS, Rows, TablePlace, place_of
from complete_fn.rows.result_tables import KeysSeen, refuse_name
from complete_fn.service.state import ServiceState
from complete_fn.store.job_tables import deliveries


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


def refuse_sink(state: ServiceState, tenant: str, sink: Mapping[str, Any]) -> None:
    """Refuse a sink that the tenant may not use.

    Raises:
        RequestError: The tenant may not write there.
    """
    if "uri" in sink:
        sink_place(state, tenant, sink)
        return
    state.connections.get(tenant, sink["connection"], writable=True)
    refuse_name(sink["table"])


def refuse_sink_keys(sink: Mapping[str, Any], rows: Rows, seen: KeysSeen) -> None:
    """Refuse rows that the sink's key does not tell apart.

    Raises:
        InputError: The key is no column, or its values do not identify the rows of this window and those before.
    """
    key = sink.get("key")
    if key is None:
        return
    if key not in rows.names:
        raise InputError(f"The sink's key {key!r} is no column. Columns: {', '.join(rows.names)}.")
    seen.add(rows.column(key), key)


def sink_place(state: ServiceState, tenant: str, sink: Mapping[str, Any]) -> tuple[Allowed, TablePlace]:
    found = allowed(sink["uri"], state.settings.sinks, tenant, "write")
    place = place_of(sink["uri"])
    if place.compression is not None:
        raise InputError(f"A sink's file is not compressed as a whole ({', '.join(COMPRESSIONS)}); take .parquet.")
    return found, place


def promise(connection: sa.Connection, job: Job) -> None:
    """Note that the job's results must be delivered once it is over, or again after a rerun.

    This ends the claim of a writer that still delivers the previous results.
    """
    c = deliveries.c
    fresh = {"status": "waiting", "rows": 0, "error": None, "tries": 0, "lease_until": 0.0, "claim": None}
    again = deliveries.update().where(c.job == job.id).values(fresh)
    if connection.execute(again).rowcount == 0:
        connection.execute(deliveries.insert().values(job=job.id, tenant=job.tenant, **fresh))


def withdraw(state: ServiceState, job: str) -> None:
    with state.store.write() as connection:
        connection.execute(deliveries.delete().where(deliveries.c.job == job))


def deliveries_of(state: ServiceState, jobs: Sequence[Job]) -> dict[str, Delivery]:
    """The deliveries of those jobs that have a sink, by the job's id."""
    mine = deliveries.c.job.in_([job.id for job in jobs])
    with state.store.read() as connection:
        found = [Delivery(*row) for row in connection.execute(sa.select(*COLUMNS).where(mine))]
    return {delivery.job: delivery for delivery in found}
