"""Warehouses call `/v1/dialects/...`. Each dialect only translates; all call-outs end in `EngineHost.complete`."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Annotated, Any, Literal, TypeVar

import anyio
from anyio import to_thread
from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from complete_fn.errors import CompleteError, InputError, TooLargeError
from complete_fn.jobs.api_keys import Principal
from complete_fn.logs import for_tenant
from complete_fn.registry import DIALECTS
from complete_fn.server.auth import Caller
from complete_fn.server.call_out_replies import PREFIX, dialect_of, refused, response
from complete_fn.server.live_chat import computed_tokens
from complete_fn.server.request_bodies import TableName
from complete_fn.service.call_out import CallOut, Detail, Dialect, Share
from complete_fn.service.call_out_batches import Admission, CallOutName, CallOuts, Settle
from complete_fn.tokens import tokens_by_bytes

Function = Literal["complete", "complete_details"]
Which = Annotated[str, TableName(DIALECTS), Path()]
JSON = {"application/json": {"schema": {"type": "object"}}}
LOOK_SECONDS = 2.0  # between two looks into the store for a batch that another process runs
T = TypeVar("T")
BODY: dict[str, Any] = {"requestBody": {"content": JSON, "required": True}}

router = APIRouter(tags=["dialects"], prefix=PREFIX.rstrip("/"))


@router.post("/{dialect}/{function}", summary="A warehouse's batch of rows", openapi_extra=BODY)
async def ask(dialect: Which, function: Function, request: Request, caller: Caller) -> Response:
    """200 with the values, or 202: ask again with GET. Sent again, it is answered again and not computed again."""
    translator = dialect_of(dialect)
    until = time.monotonic() + translator.patience
    try:
        body = unzipped(await request.body(), request)
        asked = translator.read(body, request.headers)
        name = named(caller, dialect, function, asked.batch)
        outs, admit = call_outs(request), admission(request, caller)
        values = await looked_for(request, lambda: outs.ask(name, asked, translator.seconds, admit), until)
        if values is None:
            return response(translator.busy(asked.batch))
        return await settled(translator, asked, values, until)
    except CompleteError as error:
        return refused(translator, for_tenant(dialect, error, caller.tenant))


@router.get("/{dialect}/{function}", summary="How far a batch is that was sent before")
async def poll(dialect: Which, function: Function, request: Request, caller: Caller) -> Response:
    """200 with the values, or 202. The batch is named by a header, as the warehouse does it."""
    translator = dialect_of(dialect)
    until = time.monotonic() + translator.patience
    try:
        name = named(caller, dialect, function, translator.batch(request.headers))
        outs, admit = call_outs(request), admission(request, caller)

        def look() -> tuple[CallOut, Future[list[Any]]] | None:
            known = outs.poll(name, translator.seconds, admit)
            return None if known.asked is None or known.values is None else (known.asked, known.values)

        found = await looked_for(request, look, until)
        if found is None:
            return response(translator.busy(name.batch))
        return await settled(translator, *found, until)
    except CompleteError as error:
        return refused(translator, for_tenant(dialect, error, caller.tenant))


@router.delete("/{dialect}/{function}", summary="Stop a batch, or forget its reply", status_code=204)
async def forget(dialect: Which, function: Function, request: Request, caller: Caller) -> Response:
    translator = dialect_of(dialect)
    try:
        name = named(caller, dialect, function, translator.batch(request.headers))
        await to_thread.run_sync(call_outs(request).forget, name)
        return Response(status_code=204)
    except CompleteError as error:
        return refused(translator, for_tenant(dialect, error, caller.tenant))


def call_outs(request: Request) -> CallOuts:
    found: CallOuts = request.app.state.call_outs
    return found


def named(caller: Principal, dialect: str, function: str, batch: str) -> CallOutName:
    return CallOutName(caller.tenant, caller.user, dialect, function, batch)


async def looked_for(request: Request, look: Callable[[], T | None], until: float) -> T | None:
    """The first result of `look`, repeated until `until`; None if another process of the service still runs the batch.

    The request waits here, because a warehouse that is sent away asks again at once.
    """
    while (found := await to_thread.run_sync(look)) is None:
        left = until - time.monotonic()
        if left <= 0 or await request.is_disconnected():
            return None
        await anyio.sleep(min(LOOK_SECONDS, left))
    return found


async def settled(translator: Dialect, asked: CallOut, values: Future[list[Any]], until: float) -> Response:
    """The values, if they are there by `until`; else the dialect's reply for a busy batch. The wait holds no thread."""
    waiter = asyncio.wrap_future(values)
    waiter.add_done_callback(heard)
    done, _ = await asyncio.wait([waiter], timeout=max(0.0, until - time.monotonic()))
    if not done:
        return response(translator.busy(asked.batch))
    return response(await to_thread.run_sync(translator.write, asked, waiter.result()))


def heard(waiter: asyncio.Future[list[Any]]) -> None:
    """Mark the error of a batch as seen, so that asyncio does not log it: the next request begins the batch again."""
    if not waiter.cancelled():
        waiter.exception()


def admission(request: Request, caller: Principal) -> Admission:
    """A function that takes tokens from the caller's rate limits when a batch begins. Unused tokens come back."""

    def admit(wanted: Sequence[Share]) -> Settle:
        prompts = sum(sum(tokens_by_bytes(s.prompts)) for s in wanted)
        grant = request.app.state.rates.admit(caller, prompts + sum(longest(s) for s in wanted))

        def settle(rows: Sequence[Detail] | None) -> None:
            grant.settle(prompts if rows is None else sum(map(computed_tokens, rows)))

        return settle

    return admit


def longest(share: Share) -> int:
    """The most tokens that answers to the share's rows can have."""
    asked, usual = share.call.sampling.max_tokens, share.call.model.default_max_tokens
    return (usual if asked is None else min(asked, usual)) * len(share.rows)


def unzipped(body: bytes, request: Request) -> bytes:
    """The body, decompressed if it is gzip.

    Raises:
        TooLargeError: The decompressed body is larger than the service's limit.
        InputError: The body is not whole gzip.
    """
    if request.headers.get("content-encoding", "identity") == "identity":
        return body
    limit: int = request.app.state.engines.state.limits.body_bytes
    reader = zlib.decompressobj(wbits=31)
    try:
        plain = reader.decompress(body, limit + 1)
    except zlib.error as error:
        raise InputError(f"The body is not whole gzip: {error}.") from error
    if len(plain) > limit:
        raise TooLargeError(f"The body is larger than this service takes ({limit:,} bytes).")
    if not reader.eof:
        raise InputError("The body is not whole gzip: its end is missing.")
    return plain
