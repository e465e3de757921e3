"""`/v1/models`, `/v1/chat/completions` and `/v1/completions`, as OpenAI has them."""

from __future__ import annotations

import threading
from typing import Any

import anyio
from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from complete_fn.catalogue import Model
from complete_fn.errors import EngineBusyError
from complete_fn.key_store import Principal
from complete_fn.keys import Call
from complete_fn.prompts import text_column
from complete_fn.server.auth import Caller, ServiceOf, asker
from complete_fn.server.bodies import ChatBody, CompletionBody
from complete_fn.server.refusals import refusal
from complete_fn.server.replies import (
    Detail,
    chat_body,
    chat_events,
    completion_body,
    completion_events,
    refused,
)
from complete_fn.service import Service
from complete_fn.stoppable import Stopped

AT_ONCE, WAITING = 64, 256
CLIENT_CLOSED = 499  # as nginx has it: nobody reads this
GONE_SECONDS = 0.25

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", summary="The catalogue")
def list_models(service: ServiceOf, caller: Caller) -> dict[str, Any]:
    return {"object": "list", "data": [model_body(m) for m in service.models().values()]}


@router.get("/v1/models/{name}", summary="One model of the catalogue")
def get_model(name: str, service: ServiceOf, caller: Caller) -> dict[str, Any]:
    return model_body(service.model(name))


def model_body(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "complete-fn",
        "max_model_len": model.max_model_len,
        "licence": model.licence,
    }


@router.post("/v1/chat/completions", summary="Answer one conversation", response_model=None)
async def chat(body: ChatBody, request: Request, service: ServiceOf, caller: Caller) -> Response:
    caller.require("complete")
    rows = await answer(request, service, body.chat_call(service.model(body.model)), [body.prompt()], caller)
    if isinstance(rows, Response):
        return rows
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(chat_events(body.model, rows[0], usage), media_type="text/event-stream")
    return reply(chat_body(body.model, rows[0]), rows)


@router.post("/v1/completions", summary="Answer one prompt or several", response_model=None)
async def complete(body: CompletionBody, request: Request, service: ServiceOf, caller: Caller) -> Response:
    caller.require("complete")
    rows = await answer(request, service, body.completion_call(service.model(body.model)), body.texts(), caller)
    if isinstance(rows, Response):
        return rows
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(completion_events(body.model, rows, usage), media_type="text/event-stream")
    return reply(completion_body(body.model, rows), rows)


def reply(body: dict[str, Any], rows: list[Detail]) -> JSONResponse:
    """The reply; its headers say what it cost and whether it was computed for this request."""
    cost = sum(row["cost"] for row in rows)
    sources = ",".join(sorted({row["source"] for row in rows}))
    return JSONResponse(body, headers={"X-Complete-Cost": f"{cost:.9f}", "X-Complete-Source": sources})


async def answer(
    request: Request, service: Service, call: Call, prompts: list[str], caller: Principal
) -> list[Detail] | Response:
    """A row of details for each prompt, or why there is none. A client that goes away stops its rows."""
    state = request.app.state
    if state.lanes.statistics().tasks_waiting >= WAITING:
        raise EngineBusyError(f"{AT_ONCE} requests run and {WAITING} wait. Try again in a moment, or use a job.")
    stop = threading.Event()
    rows: list[Detail] = []
    failure: BaseException | None = None

    def work() -> None:
        answers = service.complete(call, text_column(prompts), asker(caller), stop)
        rows.extend(answers.details.to_pylist())

    async with anyio.create_task_group() as group:
        group.start_soon(watch, request, stop)
        try:
            await to_thread.run_sync(work, limiter=state.lanes, abandon_on_cancel=True)
        except (Exception, Stopped) as error:
            failure = error
        except BaseException:
            stop.set()
            raise
        group.cancel_scope.cancel()
    if isinstance(failure, Stopped):
        return Response(status_code=CLIENT_CLOSED)
    if failure is not None:
        raise failure
    why = next((r for row in rows if (r := refused(row)) is not None), None)
    return rows if why is None else refusal(*why)


async def watch(request: Request, stop: threading.Event) -> None:
    while not await request.is_disconnected():
        await anyio.sleep(GONE_SECONDS)
    stop.set()
