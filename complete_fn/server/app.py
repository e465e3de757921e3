"""`make_app`: the FastAPI application of a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio import to_thread
from fastapi import FastAPI

from complete_fn import __version__
from complete_fn.server import (
    routes_batches,
    routes_completions,
    routes_files,
    routes_health,
    routes_jobs,
    routes_usage,
)
from complete_fn.server.auth import Door
from complete_fn.server.refusals import Bounds, add_refusals
from complete_fn.service import Service
from complete_fn.worker_loop import AT_ONCE, WorkerLoop

ROUTERS = (
    routes_health.router,
    routes_completions.router,
    routes_files.router,
    routes_jobs.router,
    routes_batches.router,
    routes_usage.router,
)
DESCRIPTION = """\
COMPLETE(model, prompt) over HTTP. Any OpenAI client works with `base_url` at `/v1`. Models are named as in the
catalogue. Errors are `{"error": {"message", "type", "param", "code"}}` everywhere."""


def make_app(service: Service, loopback: bool = True, workers: int = AT_ONCE) -> FastAPI:
    """The application; it owns the service from here on and closes it when it ends.

    Args:
        loopback: whether only this machine reaches it. If so, and as long as no API key was ever made, none is asked
            for.
        workers: parts of jobs that run at the same time.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.lanes = anyio.CapacityLimiter(routes_completions.AT_ONCE)
        app.state.loop = WorkerLoop(service, workers)
        app.state.loop.start()
        yield
        await to_thread.run_sync(app.state.loop.close)
        service.close()

    app = FastAPI(title="complete-fn", version=__version__, description=DESCRIPTION, lifespan=lifespan)
    app.state.service = service
    add_refusals(app)
    app.add_middleware(Door, service=service, loopback=loopback)
    app.add_middleware(Bounds, upload_bytes=service.limits.upload_bytes, body_bytes=service.limits.body_bytes)
    for router in ROUTERS:
        app.include_router(router)
    return app
