"""`/v1/jobs`: bulk work on tables. Submit an uploaded table, watch it, fetch its rows with their answers."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse
from pydantic import ConfigDict, Field

from complete_fn.job_results import FORMATS, write_results
from complete_fn.jobs import Job
from complete_fn.ledger import money
from complete_fn.server.auth import Caller, ServiceOf
from complete_fn.server.bodies import Body
from complete_fn.server.routes_files import Limit, page
from complete_fn.service import Service
from complete_fn.submit import RESULT_COLUMN, TableSpec, submit_table

CHUNK = 1 << 16

router = APIRouter(tags=["jobs"])


class FileSource(Body):
    """The rows of an uploaded file."""

    file_id: str


class JobBody(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "demo-llama",
                    "prompt": "Name the section: {description}",
                    "source": {"file_id": "file-0123456789abcdef01234567"},
                    "options": {"max_tokens": 16},
                    "max_cost": "0.50",
                }
            ]
        }
    )
    model: str
    prompt: Annotated[str, Field(description="{column} is replaced; {{ and }} are braces")]
    source: FileSource
    options: dict[str, Any] = Field(default_factory=dict, description="as in `complete`: temperature 0 if not given")
    column: Annotated[str, Field(min_length=1, max_length=255, description="name of the answers")] = RESULT_COLUMN
    max_cost: Annotated[str | float | None, Field(description="never spend more, in the prices' currency")] = None
    priority: Annotated[int, Field(ge=-100, le=100, description="among the tenant's own jobs")] = 0
    query_tag: Annotated[str, Field(max_length=255)] | None = None
    idempotency_key: Annotated[str, Field(min_length=1, max_length=255)] | None = None


def job_body(service: Service, job: Job) -> dict[str, Any]:
    c = service.jobs.counts(job)
    usage = {
        "prompt_tokens": c.prompt_tokens,
        "cached_tokens": c.cached_tokens,
        "completion_tokens": c.completion_tokens,
    }
    cap = None if job.max_cost_nano is None else str(money(job.max_cost_nano))
    return {
        "id": job.id,
        "object": "job",
        "status": job.status,
        "model": job.model,
        "rows": {"total": job.rows, "done": c.done, "failed": c.failed, "null": job.nulls},
        "usage": usage,
        "cost": {"amount": str(money(c.cost_nano)), "currency": job.currency, "basis": job.basis, "max_cost": cap},
        "eta_seconds": eta(job, c.done),
        "priority": job.priority,
        "query_tag": job.query_tag,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "error": job.error,
    }


def eta(job: Job, done: int) -> float | None:
    """Seconds left at the pace since the job began, its engine's start included; None while there is no pace."""
    worked = done - job.nulls
    if job.over or job.started_at is None or worked <= 0:
        return None
    return round((time.time() - job.started_at) / worked * (job.rows - done), 1)


@router.post("/v1/jobs", summary="Submit a job over an uploaded table", status_code=201)
def create_job(
    body: JobBody,
    service: ServiceOf,
    caller: Caller,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> dict[str, Any]:
    """A wrong model, option, template or file is refused here, before anything is paid for."""
    caller.require("jobs")
    spec = TableSpec(
        model=body.model,
        prompt=body.prompt,
        file_id=body.source.file_id,
        options=body.options,
        column=body.column,
        max_cost=body.max_cost,
        priority=body.priority,
        idempotency_key=body.idempotency_key or idempotency_key or None,
        query_tag=body.query_tag,
    )
    with service.tables_at_once:
        job = submit_table(service, caller, spec)
    return job_body(service, job)


@router.get("/v1/jobs", summary="The tenant's jobs, newest first")
def list_jobs(service: ServiceOf, caller: Caller, limit: Limit = 20, after: str | None = None) -> dict[str, Any]:
    caller.require("jobs")
    found = service.jobs.newest(caller.tenant, "table", limit + 1, after)
    return page([job_body(service, job) for job in found], limit)


@router.get("/v1/jobs/{job_id}", summary="How far a job is")
def get_job(job_id: str, service: ServiceOf, caller: Caller) -> dict[str, Any]:
    caller.require("jobs")
    return job_body(service, service.jobs.get(caller.tenant, job_id, "table"))


@router.post("/v1/jobs/{job_id}/cancel", summary="Stop a job; the rows that are done stay")
def cancel_job(job_id: str, service: ServiceOf, caller: Caller) -> dict[str, Any]:
    caller.require("jobs")
    job = service.jobs.get(caller.tenant, job_id, "table")
    return job_body(service, service.jobs.stop(job, "cancelled"))


@router.delete("/v1/jobs/{job_id}", summary="Delete a job's input, results and stored answers; its ledger lines stay")
def delete_job(job_id: str, service: ServiceOf, caller: Caller) -> dict[str, Any]:
    caller.require("jobs")
    job = service.jobs.get(caller.tenant, job_id, "table")
    service.jobs.delete(job)
    shutil.rmtree(service.job_folder(job.id), ignore_errors=True)
    return {"id": job.id, "object": "job", "deleted": True}


@router.get("/v1/jobs/{job_id}/results", summary="The rows with their answers")
def get_results(
    job_id: str,
    service: ServiceOf,
    caller: Caller,
    format: Literal["parquet", "jsonl", "arrow", "csv"] = "parquet",
    details: Annotated[bool, Query(description="add error, usage, cost and source of each row")] = False,
    partial: Annotated[bool, Query(description="only the rows that are done, also before the job is over")] = False,
) -> StreamingResponse:
    caller.require("jobs")
    job = service.jobs.get(caller.tenant, job_id, "table")
    sink = tempfile.TemporaryFile(dir=service.folder)  # noqa: SIM115  closed when it has been sent
    try:
        with service.tables_at_once:
            write_results(service, job, format, details, partial, sink)
        sink.seek(0)
    except BaseException:
        sink.close()
        raise
    return StreamingResponse(chunks(sink), media_type=FORMATS[format])


def chunks(source: BinaryIO) -> Iterator[bytes]:
    with source:
        while chunk := source.read(CHUNK):
            yield chunk
