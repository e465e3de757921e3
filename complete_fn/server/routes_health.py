"""Whether the service lives, and whether it accepts work."""

from __future__ import annotations

from fastapi import APIRouter

from complete_fn.server.auth import ServiceOf

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The API lives")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="API and state accept work, models loaded or not")
def readyz(service: ServiceOf) -> dict[str, str]:
    service.keys.any()  # a StoreError becomes a 5xx
    return {"status": "ready"}
