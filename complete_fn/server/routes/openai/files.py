"""`/v1/files` has uploaded tables and batches, and the result files of batches, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, UploadFile
from fastapi.responses import StreamingResponse

from complete_fn.errors import InputError
from complete_fn.jobs.list_filters import FileFilter
from complete_fn.jobs.uploads import Upload
from complete_fn.server.auth import Caller, StateOf
from complete_fn.server.fair_slots import LanesOf
from complete_fn.server.routes.query_parameters import CreatedAfter, CreatedBefore, Limit, seconds_of

PURPOSES = ("batch", "user_data")
CHUNK = 1 << 16
SHORTEST, LONGEST = 3_600, 2_592_000  # seconds that a file may live, as in OpenAI's API

router = APIRouter(tags=["files"])


def file_body(upload: Upload) -> dict[str, Any]:
    return {
        "id": upload.id,
        "object": "file",
        "bytes": upload.bytes,
        "created_at": int(upload.created_at),
        "expires_at": None if upload.expires_at is None else int(upload.expires_at),
        "filename": upload.name,
        "purpose": upload.purpose,
        "status": "processed",
    }


def page(found: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A page in OpenAI's form. `found` has one entry more than `limit` if there are more."""
    shown = found[:limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(found) > limit}


@router.post("/v1/files", summary="Upload a table (.parquet, .csv, .jsonl) or a batch (.jsonl)")
async def upload_file(
    state: StateOf,
    caller: Caller,
    lanes: LanesOf,
    file: Annotated[UploadFile, File()],
    purpose: Annotated[str, Form()],
    anchor: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=SHORTEST, le=LONGEST)] = None,
) -> dict[str, Any]:
    """Kept as long as this service keeps files, or for `expires_after` seconds (3600 to 2592000)."""
    if purpose not in PURPOSES:
        raise InputError(f"purpose = {purpose!r} is not one of {', '.join(PURPOSES)}.")
    name = (file.filename or "").replace("\\", "/").rpartition("/")[2]
    if (anchor is None) != (seconds is None):
        raise InputError("expires_after needs both 'anchor' ('created_at') and 'seconds'.")
    Upload("", caller.tenant, name, purpose, 0, 0.0, None).format  # noqa: B018  refuses names that say no format

    def work() -> dict[str, Any]:
        return file_body(state.uploads.save(caller.tenant, name, purpose, file.file, seconds))

    return await lanes.tables.run(caller.tenant, work)


@router.get("/v1/files", summary="The tenant's files, newest first")
async def list_files(
    state: StateOf,
    caller: Caller,
    lanes: LanesOf,
    purpose: str | None = None,
    limit: Limit = 100,
    after: str | None = None,
    order: Annotated[Literal["asc", "desc"], Query(description="by their age; `desc` is newest first")] = "desc",
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
) -> dict[str, Any]:
    which = FileFilter(purpose, seconds_of(created_after), seconds_of(created_before))

    def work() -> dict[str, Any]:
        found = state.uploads.newest(caller.tenant, limit + 1, after, which, order == "desc")
        return page([file_body(f) for f in found], limit)

    return await lanes.reports.run(caller.tenant, work)


@router.get("/v1/files/{file_id}", summary="One file")
def get_file(file_id: str, state: StateOf, caller: Caller) -> dict[str, Any]:
    return file_body(state.uploads.get(caller.tenant, file_id))


@router.get("/v1/files/{file_id}/content", summary="A file's bytes")
def get_content(file_id: str, state: StateOf, caller: Caller) -> StreamingResponse:
    upload = state.uploads.get(caller.tenant, file_id)
    opened = ExitStack()
    source = opened.enter_context(state.storage.reading(state.uploads.key(upload)))
    headers = {"Content-Length": str(upload.bytes)}
    return StreamingResponse(chunks(source, opened), headers=headers, media_type="application/octet-stream")


def chunks(source: IO[bytes], opened: ExitStack) -> Iterator[bytes]:
    """A file in pieces. `opened` is closed at the end."""
    with opened:
        while chunk := source.read(CHUNK):
            yield chunk


@router.delete("/v1/files/{file_id}", summary="Delete a file; jobs keep their own copy")
def delete_file(file_id: str, state: StateOf, caller: Caller) -> dict[str, Any]:
    state.uploads.delete(state.uploads.get(caller.tenant, file_id))
    return {"id": file_id, "object": "file", "deleted": True}
