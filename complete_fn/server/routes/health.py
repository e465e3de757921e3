"""`/healthz` and `/readyz` tell whether the service lives and accepts work; `/metrics` counts for Prometheus."""

from __future__ import annotations

import time

import anyio
from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from complete_fn.errors import StoreUpgradedError
from complete_fn.server.auth import Caller
from complete_fn.server.error_replies import refusal
from complete_fn.server.fair_slots import LanesOf
from complete_fn.service.state import ServiceState

READY_SECONDS = 1.0  # an answer of the store counts for so long, however many ask


class Readiness:
    """Whether the store answers, on a thread of its own: requests that hold all others do not hide it."""

    def __init__(self, state: ServiceState) -> None:
        self.state = state
        self.limiter = anyio.CapacityLimiter(1)
        self.answered_at = -READY_SECONDS

    async def check(self) -> None:
        """Raises:
        StoreError: The store does not answer.
        """
        await to_thread.run_sync(self.look, limiter=self.limiter)

    def look(self) -> None:
        if time.monotonic() - self.answered_at >= READY_SECONDS:
            self.state.store.ping()
            self.answered_at = time.monotonic()


router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The API lives")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/metrics", summary="Counts for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request, caller: Caller, lanes: LanesOf) -> Response:
    registry = request.app.state.metrics.registry
    text = await lanes.reports.run(caller.tenant, lambda: generate_latest(registry))
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/readyz", summary="API and workers accept work, models loaded or not", response_model=None)
async def readyz(request: Request) -> dict[str, str] | JSONResponse:
    await request.app.state.readiness.check()
    store = request.app.state.engines.state.store
    if store.is_outdated:
        raise StoreUpgradedError
    if not request.app.state.loop.alive():
        return refusal(503, "A worker thread has ended. Restart the service.", "worker_gone")
    differs = store.database.clock.difference()
    return {"status": "ready"} if differs is None else {"status": "ready", "warning": differs}
