"""An API process that runs no model passes chats on to a worker process, streams included."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable

import anyio
import httpx
from anyio import to_thread
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from complete_fn.errors import EngineError
from complete_fn.jobs.api_keys import Principal
from complete_fn.jobs.worker_store import Beat
from complete_fn.server.error_replies import CLIENT_CLOSED
from complete_fn.server.fair_slots import GONE_SECONDS
from complete_fn.server.rate_limits import Grant
from complete_fn.service.state import ServiceState

TENANT, USER, TOKENS = "x-complete-tenant", "x-complete-user", "x-complete-tokens"
EVENT = re.compile(rb"^data: ", re.MULTILINE)
TAIL = re.compile(rb"^: tokens (\d+)$", re.MULTILINE)
SHOWN = ("content-type", "retry-after", "x-complete-cost", "x-complete-source")
FRESH_SECONDS = 1.0
NOBODY_THERE = (httpx.ConnectError, httpx.ConnectTimeout)
NOBODY = "No worker is up for model {model!r}. One is asked for; try again in a moment."


class Proxy:
    """Finds a worker and passes requests on to it.

    Args:
        secret: the secret that the workers know.
        want: asks for a worker for a model; None if this process starts no workers.
    """

    def __init__(self, state: ServiceState, secret: str, want: Callable[[str], None] | None) -> None:
        self.state, self.secret, self.want = state, secret, want
        self.client = httpx.AsyncClient(  # without HTTP_PROXY: a proxy would see secret and prompts
            trust_env=False,
            timeout=httpx.Timeout(None, connect=5.0),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=4.0),
        )
        self.beats: list[Beat] = []
        self.looked = 0.0

    async def forward(self, request: Request, model: str, caller: Principal, grant: Grant, prompt: int) -> Response:
        """A worker's reply. The grant is settled with the tokens that the worker reports, or else with `prompt`.

        Raises:
            EngineError: No worker is up.
        """
        for beat in await self.candidates(model):
            try:
                return await proxy(self.client, request, str(beat.address), self.secret, caller, grant, prompt)
            except NOBODY_THERE:
                self.looked = 0.0  # this worker is gone, so read the heartbeats again; try the next worker
        await grant.settled(0)
        if self.want is not None:
            self.want(model)
        raise EngineError(NOBODY.format(model=model)).for_everybody()

    async def candidates(self, model: str) -> list[Beat]:
        """The workers that accept requests: first those with a warm engine, and among them the least busy first."""
        now = time.monotonic()
        if now - self.looked > FRESH_SECONDS:
            self.beats, self.looked = list(await to_thread.run_sync(self.state.workers.alive)), now
        up = [beat for beat in self.beats if beat.address and not beat.draining]
        return sorted(up, key=lambda beat: (not beat.warm(model), beat.in_flight))

    async def close(self) -> None:
        await self.client.aclose()


async def proxy(
    client: httpx.AsyncClient,
    request: Request,
    address: str,
    secret: str,
    caller: Principal,
    grant: Grant,
    prompt: int,
) -> Response:
    """The reply of the worker at `address`, streamed. A client that goes away also ends the worker's request.

    Raises:
        httpx.ConnectError, httpx.ConnectTimeout: No worker is at the address, and nothing was run.
        EngineError: The worker broke the connection before it replied.
    """
    headers = {"authorization": f"Bearer {secret}", TENANT: caller.tenant, USER: caller.user}
    headers["content-type"] = request.headers.get("content-type", "application/json")
    asked = client.build_request("POST", address + request.url.path, content=await request.body(), headers=headers)
    sending = asyncio.create_task(client.send(asked, stream=True))
    leaving = asyncio.create_task(left(request))
    try:
        await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            await grant.settled(prompt)
            return Response(status_code=CLIENT_CLOSED)
        upstream = sending.result()
    except NOBODY_THERE:
        raise
    except httpx.HTTPError as error:
        await grant.settled(prompt)
        raise EngineError(f"The worker broke off: {type(error).__name__}. Try again.").for_everybody() from error
    finally:
        leaving.cancel()
        sending.cancel()
    shown = {name: upstream.headers[name] for name in SHOWN if name in upstream.headers}
    return StreamingResponse(body(upstream, grant, prompt), upstream.status_code, shown)


async def body(upstream: httpx.Response, grant: Grant, prompt: int) -> AsyncIterator[bytes]:
    used, tail = prompt, b""
    if TOKENS in upstream.headers:
        used = int(upstream.headers[TOKENS])
    try:
        async for piece in upstream.aiter_raw():
            used += len(EVENT.findall(piece))  # counts if the client leaves: an event has about one token
            tail = (tail + piece)[-256:]
            yield piece
    finally:
        if (told := TAIL.search(tail)) is not None:
            used = int(told[1])
        with anyio.CancelScope(shield=True):
            await grant.settled(used)
            await upstream.aclose()


async def left(request: Request) -> None:
    while not await request.is_disconnected():
        await anyio.sleep(GONE_SECONDS)
