"""The routes `/v1/models`, `/v1/chat/completions` and `/v1/completions`, as OpenAI has them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from complete_fn.engines.catalogue import Model
from complete_fn.jobs.api_keys import Principal
from complete_fn.server.auth import Caller, EnginesOf, StateOf, asker
from complete_fn.server.error_replies import CLIENT_CLOSED, refusal
from complete_fn.server.live_chat import Live, computed_tokens
from complete_fn.server.rate_limits import RateLimits
from complete_fn.server.replies import Chunks, Detail, all_refused, chat_body, completion_body
from complete_fn.server.request_bodies import ChatBody, CompletionBody
from complete_fn.server.streams import EventStream
from complete_fn.server.worker_proxy import Proxy

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", summary="The catalogue")
def list_models(
    state: StateOf,
    caller: Caller,
    client_version: Annotated[str | None, Query(description="Codex sends it; it changes nothing")] = None,
) -> dict[str, Any]:
    return {"object": "list", "data": [model_body(m) for m in state.models().values()]}


@router.get("/v1/models/{name}", summary="One model of the catalogue")
def get_model(name: str, state: StateOf, caller: Caller) -> dict[str, Any]:
    return model_body(state.model(name))


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
async def chat(body: ChatBody, request: Request, engines: EnginesOf, caller: Caller) -> Response:
    live = Live(request, engines, body.chat_call(engines.state.model(body.model)), [body.prompt()], asker(caller))
    return await answer(live, body, Chunks("chat.completion.chunk", body.model, body.wants_usage), caller)


@router.post("/v1/completions", summary="Answer one prompt or several", response_model=None)
async def complete(body: CompletionBody, request: Request, engines: EnginesOf, caller: Caller) -> Response:
    """Of several prompts one that fails ends with finish_reason `error`; its choice says why in `error`."""
    live = Live(request, engines, body.completion_call(engines.state.model(body.model)), body.texts(), asker(caller))
    return await answer(live, body, Chunks("text_completion", body.model, body.wants_usage), caller)


async def answer(live: Live, body: ChatBody | CompletionBody, chunks: Chunks, caller: Principal) -> Response:
    """The reply. An error before the first piece of text has its own status."""
    live.lanes.chats.refuse_crowd(caller.tenant)
    rates: RateLimits = live.request.app.state.rates
    grant = await rates.admitted(caller, live.most_tokens)
    remote: Proxy | None = live.request.app.state.remote
    if remote is not None:
        response = await remote.forward(live.request, body.model, caller, grant, live.prompt_tokens)
    else:
        live.start(grant, body.priority, body.stream)
        response = await first_reply(live, body, chunks)
    response.headers.update(grant.headers)
    return response


async def first_reply(live: Live, body: ChatBody | CompletionBody, chunks: Chunks) -> Response:
    first = await live.first()
    if first is not None:
        return EventStream(live, chunks, first)
    if live.left:
        return Response(status_code=CLIENT_CLOSED)
    rows = live.outcome()
    if (why := all_refused(rows)) is not None:
        return refusal(*why)
    if body.stream:
        return EventStream(live, chunks, None)
    return reply(chat_body(body.model, rows[0]) if chunks.of_chat else completion_body(body.model, rows), rows)


def reply(body: dict[str, Any], rows: list[Detail]) -> JSONResponse:
    """The reply, with headers that tell its cost, whether it was computed for this request, and an engine's tokens."""
    cost = sum(row["cost"] for row in rows)
    sources = ",".join(sorted({row["source"] for row in rows}))
    tokens = str(sum(map(computed_tokens, rows)))
    headers = {"X-Complete-Cost": f"{cost:.9f}", "X-Complete-Source": sources, "X-Complete-Tokens": tokens}
    return JSONResponse(body, headers=headers)
