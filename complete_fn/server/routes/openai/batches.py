"""`/v1/batches` is like OpenAI's. A batch is a job whose rows are requests and whose results are files."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field

from complete_fn.errors import DamagedFileError, InputError
from complete_fn.jobs.api_keys import Principal
from complete_fn.jobs.job import Counts, Job
from complete_fn.jobs.list_filters import JobFilter
from complete_fn.server.auth import Caller, StateOf
from complete_fn.server.batch_lines import answer_lines, groups, read_lines
from complete_fn.server.error_replies import told
from complete_fn.server.fair_slots import LanesOf
from complete_fn.server.request_bodies import Body
from complete_fn.server.routes.openai.files import page
from complete_fn.server.routes.query_parameters import CreatedAfter, CreatedBefore, Limit, seconds_of
from complete_fn.service.job_files import details_of, undamaged, windows_of
from complete_fn.service.retention import delete_job
from complete_fn.service.state import ServiceState
from complete_fn.service.submit import drafted, new_job

DAY = 86_400
STATUS = {"queued": "in_progress", "running": "in_progress", "stopping": "finalizing"}
REQUESTS, OUTPUTS = "requests.jsonl", "outputs.json"
Metadata = Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)]

router = APIRouter(tags=["batches"])


class BatchBody(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "input_file_id": "file-0123456789abcdef01234567",
                    "endpoint": "/v1/chat/completions",
                    "completion_window": "24h",
                }
            ]
        }
    )
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


@router.post("/v1/batches", summary="Run an uploaded file of requests")
async def create_batch(body: BatchBody, state: StateOf, caller: Caller, lanes: LanesOf) -> dict[str, Any]:
    """A line that cannot be run, or a custom_id used twice, is refused here, before anything is paid for."""
    return await lanes.tables.run(caller.tenant, lambda: batch_body(state, submit_batch(state, caller, body)))


def submit_batch(state: ServiceState, caller: Principal, body: BatchBody) -> Job:
    """Raises:
    RequestError: The file or one of its lines cannot be run; nothing was kept.
    """
    upload = state.uploads.get(caller.tenant, body.input_file_id)
    if upload.purpose != "batch":
        raise InputError(f"File {upload.id} has purpose {upload.purpose!r}; upload it with purpose 'batch'.")
    content = state.uploads.content(upload)
    lines = read_lines(state, content, body.endpoint)
    model, until = lines[0].call.model, state.store.now() + DAY
    job = new_job(state, caller, "batch", model, len(lines), body.model_dump(), deadline=until)
    with drafted(state, job) as draft:
        with state.storage.writing(state.job_key(job.id, REQUESTS)) as sink:
            draft.bytes += sink.write(content)
        draft.add_window(len(lines), groups(lines))
        return draft.keep()


@router.get("/v1/batches", summary="The tenant's batches, newest first")
async def list_batches(
    request: Request,
    state: StateOf,
    caller: Caller,
    lanes: LanesOf,
    limit: Limit = 20,
    after: str | None = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
) -> dict[str, Any]:
    """A batch whose files cannot be read says so in `errors`."""
    which = JobFilter(created_after=seconds_of(created_after), created_before=seconds_of(created_before))

    def work() -> dict[str, Any]:
        found = state.jobs.newest(caller.tenant, "batch", limit + 1, after, which)
        counts = state.jobs.progress(found)
        return page([listed(request, state, job, counts[job.id]) for job in found], limit)

    return await lanes.reports.run(caller.tenant, work)


def listed(request: Request, state: ServiceState, job: Job, counts: Counts) -> dict[str, Any]:
    """The batch. If its files cannot be read, only this batch tells an error, and the page goes on."""
    try:
        return body_of(state, job, counts)
    except Exception as error:
        _, message, code = told(request, error)
        return body_of(state, job, counts, (code, message))


@router.get("/v1/batches/{batch_id}", summary="How far a batch is")
def get_batch(batch_id: str, state: StateOf, caller: Caller) -> dict[str, Any]:
    return batch_body(state, state.jobs.get(caller.tenant, batch_id, "batch"))


@router.post("/v1/batches/{batch_id}/cancel", summary="Stop a batch; the answers that are done stay")
def cancel_batch(batch_id: str, state: StateOf, caller: Caller) -> dict[str, Any]:
    job = state.jobs.get(caller.tenant, batch_id, "batch")
    return batch_body(state, state.jobs.stop(job, "cancelled"))


@router.delete(
    "/v1/batches/{batch_id}", summary="Delete a batch and its stored answers; files are deleted by themselves"
)
def delete_batch(batch_id: str, state: StateOf, caller: Caller) -> dict[str, Any]:
    job = state.jobs.get(caller.tenant, batch_id, "batch")
    delete_job(state, job)
    return {"id": job.id, "object": "batch", "deleted": True}


def batch_body(state: ServiceState, job: Job) -> dict[str, Any]:
    return body_of(state, job, state.jobs.counts(job))


def body_of(state: ServiceState, job: Job, counts: Counts, unreadable: tuple[str, str] | None = None) -> dict[str, Any]:
    """The batch with its result files; or without them and with `unreadable` (code, message) as the reason."""
    asked = json.loads(job.request)
    outputs = outputs_of(state, job) if job.over and unreadable is None else {"output": None, "errors": None}
    status = STATUS.get(job.status, job.status)
    if job.status == "stopping" and job.ends_as == "cancelled":
        status = "cancelling"
    code, message = unreadable or ("batch_failed", job.error)
    errors = {"object": "list", "data": [{"code": code, "message": message, "line": None, "param": None}]}
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": asked["endpoint"],
        "errors": errors if message else None,
        "input_file_id": asked["input_file_id"],
        "completion_window": asked["completion_window"],
        "status": status,
        "output_file_id": outputs["output"],
        "error_file_id": outputs["errors"],
        "created_at": int(job.created_at),
        "in_progress_at": second(job.started_at),
        "expires_at": second(job.deadline),
        **{f"{end}_at": ended(job, end) for end in ("completed", "failed", "expired", "cancelled")},
        "request_counts": {"total": job.rows, "completed": counts.done - counts.failed, "failed": counts.failed},
        "metadata": asked["metadata"],
    }


def second(at: float | None) -> int | None:
    return None if at is None else int(at)


def ended(job: Job, status: str) -> int | None:
    return second(job.ended_at) if job.status == status else None


def outputs_of(state: ServiceState, job: Job) -> dict[str, str | None]:
    """Ids of the files of answers and of errors, which are written when first requested; None for an empty file."""
    note = state.job_key(job.id, OUTPUTS)
    with state.outputs_lock:
        # A note that is missing or damaged is written again, with the files.
        with suppress(DamagedFileError), undamaged(job.id, OUTPUTS), state.storage.reading(note) as source:
            found: dict[str, str | None] = json.loads(source.read())
            return found
        made = write_outputs(state, job)
        with state.storage.writing(note) as sink:
            sink.write(json.dumps(made).encode())
        return made


def write_outputs(state: ServiceState, job: Job) -> dict[str, str | None]:
    with undamaged(job.id, REQUESTS), state.storage.reading(state.job_key(job.id, REQUESTS)) as source:
        requests = source.read()
    (window,) = windows_of(state, job)
    details = details_of(state, job, window, state.jobs.parts(job.id), set()).to_pylist()
    stem = f"file-{job.id.removeprefix('batch_')}"
    made: dict[str, str | None] = {"output": None, "errors": None}
    lines = list(answer_lines(job, requests, details))
    for good, kind in ((True, "output"), (False, "errors")):
        chosen = [line for is_good, line in lines if is_good == good]
        if not chosen:
            continue
        made[kind] = f"{stem}-{kind[:3]}"
        name = f"{job.id}_{kind}.jsonl"
        with state.uploads.writing(job.tenant, name, "batch_output", made[kind]) as (sink, _):
            sink.writelines(chosen)
    return made
