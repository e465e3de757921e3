"""`make_app` builds the FastAPI application of a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI

from complete_fn import __version__
from complete_fn.server.auth import Door
from complete_fn.server.error_replies import Bounds, add_refusals
from complete_fn.server.fair_slots import Lanes
from complete_fn.server.metrics import Metrics, RequestCounter
from complete_fn.server.rate_limits import RateLimits
from complete_fn.server.routes import call_outs, health
from complete_fn.server.routes.jobs import estimate, jobs, usage
from complete_fn.server.routes.openai import batches, completions, files
from complete_fn.server.worker_api import internal_secret
from complete_fn.server.worker_proxy import Proxy
from complete_fn.service.call_out_batches import CallOuts
from complete_fn.service.service import Service
from complete_fn.worker.loop import AT_ONCE, WorkerLoop
from complete_fn.worker.maintenance import Maintenance

ROUTERS = (
    health.router,
    completions.router,
    files.router,
    jobs.router,
    estimate.router,
    batches.router,
    usage.router,
    call_outs.router,
)
DESCRIPTION = """\
COMPLETE(model, prompt) over HTTP. Any OpenAI client works with `base_url` at `/v1`. Models are named as in the
catalogue. Errors are `{"error": {"message", "type", "param", "code"}}` everywhere."""


def make_app(
    service: Service, loopback: bool = True, workers: int = AT_ONCE, maintenance: Maintenance | None = None
) -> FastAPI:
    """The application. It owns the service from now on, and closes the service when it ends.

    Args:
        loopback: whether only this machine can reach the application. If so, no API key is needed as long as none was
            ever made.
        workers: parts of jobs that run at the same time in this process.
        maintenance: the maintenance for worker processes, which then run the jobs and answer chats; None if this
            process does both itself.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.lanes, app.state.readiness = Lanes(), health.Readiness(service)
        app.state.loop = maintenance or WorkerLoop(service, workers)
        app.state.loop.start()
        app.state.call_outs = CallOuts(service)
        yield
        app.state.call_outs.close()
        if app.state.remote is not None:
            await app.state.remote.close()
        await to_thread.run_sync(app.state.loop.close)
        service.close()

    app = FastAPI(title="complete-fn", version=__version__, description=DESCRIPTION, lifespan=lifespan)
    app.state.service, app.state.metrics, app.state.rates = service, Metrics(service), RateLimits(service.store)
    app.state.remote, app.state.internal = remote_of(service, maintenance), False
    add_refusals(app)
    app.add_middleware(Door, service=service, loopback=loopback)
    app.add_middleware(Bounds, upload_bytes=service.limits.upload_bytes, body_bytes=service.limits.body_bytes)
    app.add_middleware(RequestCounter, metrics=app.state.metrics)
    for router in ROUTERS:
        app.include_router(router)
    return app


def remote_of(service: Service, maintenance: Maintenance | None) -> Proxy | None:
    """The proxy that passes chats on to the worker processes; None without worker processes."""
    if maintenance is None:
        return None
    secret = internal_secret(service.settings.internal_secret, service.settings.home)
    return Proxy(service, secret, maintenance.fleet.want if maintenance.fleet is not None else None)
