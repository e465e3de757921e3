"""`/healthz` and `/readyz` tell whether the service lives and accepts work; `/metrics` counts for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from complete_fn.server.auth import Caller, ServiceOf
from complete_fn.server.error_replies import refusal

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The API lives")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/metrics", summary="Counts for Prometheus", response_class=PlainTextResponse)
def metrics(request: Request, caller: Caller) -> Response:
    caller.require("metrics")
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/readyz", summary="API and workers accept work, models loaded or not", response_model=None)
def readyz(request: Request, service: ServiceOf) -> dict[str, str] | JSONResponse:
    service.keys.any()  # reads the store, whose StoreError becomes a 5xx
    if not request.app.state.loop.alive():
        return refusal(503, "A worker thread has ended. Restart the service.", "worker_gone")
    return {"status": "ready"}
