"""`/v1/jobs` does bulk work on tables: a client submits a table, watches the job, and fetches rows with answers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO, Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse
from pydantic import ConfigDict, Field

from complete_fn.errors import InputError
from complete_fn.jobs.job import Counts, Job
from complete_fn.jobs.list_filters import JobFilter
from complete_fn.rows.formats import FORMATS, TablePlace, escaping
from complete_fn.server.auth import Caller, EnginesOf, StateOf
from complete_fn.server.fair_slots import LanesOf
from complete_fn.server.request_bodies import Body, TableName
from complete_fn.server.routes.openai.files import chunks, page
from complete_fn.server.routes.query_parameters import CreatedAfter, CreatedBefore, Limit, seconds_of
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.eta import eta_seconds
from complete_fn.service.rerun import rerun
from complete_fn.service.results import write_results
from complete_fn.service.retention import delete_job
from complete_fn.service.sinks import Delivery, deliver_again, deliveries_of
from complete_fn.service.sources import LONGEST_SQL
from complete_fn.service.submit import RESULT_COLUMN, TableSpec, submit_table
from complete_fn.store.records import money

JobStatus = Literal["queued", "running", "stopping", "completed", "failed", "cancelled", "expired"]

router = APIRouter(tags=["jobs"])


class SourceBody(Body):
    """The rows: `file_id` of an upload, or `uri` under a root that is allowed, or `connection` with one SELECT."""

    file_id: str | None = None
    uri: Annotated[str, Field(max_length=1024)] | None = None
    connection: Annotated[str, Field(max_length=64)] | None = None
    sql: Annotated[str, Field(max_length=LONGEST_SQL)] | None = None

    def chosen(self) -> dict[str, str]:
        given: dict[str, str] = self.model_dump(exclude_none=True)
        if set(given) not in ({"file_id"}, {"uri"}, {"connection", "sql"}):
            raise InputError("'source' takes file_id, or uri, or connection together with sql.")
        return given


class SinkBody(Body):
    """Where the results go: `uri` of a file under a root that is allowed, or `table` of a registered `connection`.

    A table is made if missing; each row is written over the one with the same `key` (a column of the source; without
    one the row's number, as `row`).
    """

    uri: Annotated[str, Field(max_length=1024)] | None = None
    connection: Annotated[str, Field(max_length=64)] | None = None
    table: Annotated[str, Field(max_length=127)] | None = None
    key: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    escape_formulas: Annotated[bool, Field(description="as in `/v1/jobs/{job_id}/results`, for a .csv")] = False

    def chosen(self) -> dict[str, Any]:
        given: dict[str, Any] = self.model_dump(exclude_none=True, exclude_defaults=True)
        known = [{"uri"}, {"uri", "escape_formulas"}, {"connection", "table"}, {"connection", "table", "key"}]
        if set(given) not in known:
            raise InputError("'sink' takes uri (and escape_formulas), or connection together with table (and key).")
        return given


class RerunBody(Body):
    """`max_cost`: another cap for the whole job, what it has spent included."""

    max_cost: str | float | None = None


EXAMPLE: dict[str, Any] = {
    "model": "demo-llama-swiftkv",
    "prompt": "Name the section: {description}",
    "source": {"file_id": "file-0123456789abcdef01234567"},
    "options": {"max_tokens": 16},
}


class JobBody(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{**EXAMPLE, "max_cost": "0.50"}]})
    model: str
    prompt: Annotated[str, Field(description="{column} is replaced; {{ and }} are braces")]
    source: SourceBody
    sink: SinkBody | None = None
    options: dict[str, Any] = Field(default_factory=dict, description="as in `complete`: temperature 0 if not given")
    column: Annotated[str, Field(min_length=1, max_length=255, description="name of the answers")] = RESULT_COLUMN
    max_cost: Annotated[str | float | None, Field(description="never spend more, in the prices' currency")] = None
    priority: Annotated[int, Field(ge=-100, le=100, description="among the tenant's own jobs")] = 0
    query_tag: Annotated[str, Field(max_length=255)] | None = None
    idempotency_key: Annotated[str, Field(min_length=1, max_length=255)] | None = None


def job_body(engines: EngineHost, job: Job) -> dict[str, Any]:
    return job_bodies(engines, [job])[0]


def job_bodies(engines: EngineHost, found: Sequence[Job]) -> list[dict[str, Any]]:
    """The jobs as replies show them. The store is asked as often for many jobs as for one."""
    state = engines.state
    counts, sinks = state.jobs.progress(found), deliveries_of(state, found)
    left = eta_seconds(engines, [(job, counts[job.id]) for job in found])
    return [body_of(job, counts[job.id], left[job.id], sinks.get(job.id)) for job in found]


def body_of(job: Job, c: Counts, seconds_left: float | None, sink: Delivery | None) -> dict[str, Any]:
    usage = {
        "prompt_tokens": c.prompt_tokens,
        "cached_tokens": c.cached_tokens,
        "completion_tokens": c.completion_tokens,
    }
    cap = None if job.max_cost_nano is None else f"{money(job.max_cost_nano):f}"
    return {
        "id": job.id,
        "object": "job",
        "status": job.status,
        "model": job.model,
        "rows": {"total": job.rows, "done": c.done, "failed": c.failed, "null": job.nulls},
        "usage": usage,
        "cost": {"amount": f"{money(c.cost_nano):f}", "currency": job.currency, "basis": job.basis, "max_cost": cap},
        "parts": {"total": c.parts, "recomputed_tokens": c.recomputed_tokens},
        "eta_seconds": seconds_left,
        "priority": job.priority,
        "query_tag": job.query_tag,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "error": job.error,
        "sink": None if sink is None else {"status": sink.status, "rows": sink.rows, "error": sink.error},
    }


@router.post("/v1/jobs", summary="Submit a job over a table", status_code=201)
async def create_job(
    body: JobBody,
    engines: EnginesOf,
    caller: Caller,
    lanes: LanesOf,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> dict[str, Any]:
    """A wrong model, option, template or file is refused here, before anything is paid for."""
    spec = TableSpec(
        model=body.model,
        prompt=body.prompt,
        source=body.source.chosen(),
        sink=None if body.sink is None else body.sink.chosen(),
        options=body.options,
        column=body.column,
        max_cost=body.max_cost,
        priority=body.priority,
        idempotency_key=body.idempotency_key or idempotency_key or None,
        query_tag=body.query_tag,
    )
    return await lanes.tables.run(caller.tenant, lambda: job_body(engines, submit_table(engines.state, caller, spec)))


@router.get("/v1/jobs", summary="The tenant's jobs, newest first")
async def list_jobs(
    engines: EnginesOf,
    caller: Caller,
    lanes: LanesOf,
    limit: Limit = 20,
    after: str | None = None,
    status: Annotated[list[JobStatus] | None, Query(description="may be given several times")] = None,
    model: str | None = None,
    query_tag: str | None = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
) -> dict[str, Any]:
    times = seconds_of(created_after), seconds_of(created_before)
    which = JobFilter(tuple(status or ()), model, query_tag, *times)

    def work() -> dict[str, Any]:
        found = engines.state.jobs.newest(caller.tenant, "table", limit + 1, after, which)
        return page(job_bodies(engines, found), limit)

    return await lanes.reports.run(caller.tenant, work)


@router.get("/v1/jobs/{job_id}", summary="How far a job is")
def get_job(job_id: str, engines: EnginesOf, caller: Caller) -> dict[str, Any]:
    return job_body(engines, engines.state.jobs.get(caller.tenant, job_id, "table"))


@router.post("/v1/jobs/{job_id}/cancel", summary="Stop a job; the rows that are done stay")
def cancel_job(job_id: str, engines: EnginesOf, caller: Caller) -> dict[str, Any]:
    job = engines.state.jobs.get(caller.tenant, job_id, "table")
    return job_body(engines, engines.state.jobs.stop(job, "cancelled"))


@router.post("/v1/jobs/{job_id}/rerun", summary="Run the rows again that failed, or that the job never came to")
async def rerun_job(
    job_id: str, engines: EnginesOf, caller: Caller, lanes: LanesOf, body: RerunBody | None = None
) -> dict[str, Any]:
    """For a job that is over. Answers that are there stay and cost nothing more."""

    def work() -> dict[str, Any]:
        job = engines.state.jobs.get(caller.tenant, job_id, "table")
        return job_body(engines, rerun(engines.state, job, body.max_cost if body else None))

    return await lanes.tables.run(caller.tenant, work)


@router.post("/v1/jobs/{job_id}/deliver", summary="Write a job's results to its sink again")
def deliver_job(job_id: str, engines: EnginesOf, caller: Caller) -> dict[str, Any]:
    """For a job that is over. Rows are written over those that are there, and nothing is asked or paid again."""
    job = engines.state.jobs.get(caller.tenant, job_id, "table")
    deliver_again(engines.state, job)
    return job_body(engines, job)


@router.delete("/v1/jobs/{job_id}", summary="Delete a job's input, results and stored answers; its ledger lines stay")
def delete_one(job_id: str, state: StateOf, caller: Caller) -> dict[str, Any]:
    job = state.jobs.get(caller.tenant, job_id, "table")
    delete_job(state, job)
    return {"id": job.id, "object": "job", "deleted": True}


@router.get("/v1/jobs/{job_id}/results", summary="The rows with their answers")
async def get_results(
    job_id: str,
    state: StateOf,
    caller: Caller,
    lanes: LanesOf,
    format: Annotated[str, TableName(FORMATS)] = "parquet",
    details: Annotated[bool, Query(description="add error, usage, cost and source of each row")] = False,
    partial: Annotated[
        bool, Query(description="rows that are done, also before the end; all of a completed job")
    ] = False,
    escape_formulas: Annotated[
        bool, Query(description="CSV: an apostrophe before text that a spreadsheet would run as a formula")
    ] = False,
) -> StreamingResponse:
    place = escaping(TablePlace("-", format), escape_formulas)

    def work() -> IO[bytes]:
        job = state.jobs.get(caller.tenant, job_id, "table")
        sink = tempfile.TemporaryFile(dir=state.folder)  # noqa: SIM115  closed after it was sent
        try:
            write_results(state, job, place, details, partial, sink)
            sink.seek(0)
        except BaseException:
            sink.close()
            raise
        return sink

    sink = await lanes.tables.run(caller.tenant, work)
    opened = ExitStack()
    opened.callback(sink.close)
    return StreamingResponse(chunks(sink, opened), media_type=FORMATS[format].media_type)
