"""`make_app` builds the FastAPI application of a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import Depends, FastAPI

from complete_fn import __version__
from complete_fn.server.auth import Door
from complete_fn.server.connection_guard import ClientPace
from complete_fn.server.error_replies import Bounds, add_refusals
from complete_fn.server.fair_slots import Lanes
from complete_fn.server.metrics import Metrics, RequestCounter
from complete_fn.server.rate_limits import RateLimits
from complete_fn.server.routes import call_outs, health
from complete_fn.server.routes.jobs import estimate, jobs, usage
from complete_fn.server.routes.openai import batches, completions, files
from complete_fn.server.routes.query_parameters import refuse_unknown_parameters
from complete_fn.server.worker_api import internal_secret
from complete_fn.server.worker_proxy import Proxy
from complete_fn.service.call_out_batches import CallOuts
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
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
    engines: EngineHost, loopback: bool = True, workers: int = AT_ONCE, maintenance: Maintenance | None = None
) -> FastAPI:
    """The application of a service. It owns the engines and their state from now on, and closes both when it ends.

    Args:
        loopback: whether only this machine can reach the application. If so, no API key is needed as long as none was
            ever made.
        workers: parts of jobs that run at the same time in this process.
        maintenance: the maintenance for worker processes, which then run the jobs and answer chats; None if this
            process does both itself.
    """
    state = engines.state

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.lanes, app.state.readiness = Lanes(), health.Readiness(state)
        app.state.loop = maintenance or WorkerLoop(engines, workers)
        app.state.loop.start()
        app.state.call_outs = CallOuts(engines)
        yield
        app.state.call_outs.close()
        if app.state.remote is not None:
            await app.state.remote.close()
        await to_thread.run_sync(app.state.loop.close)
        engines.close()

    app = FastAPI(
        title="complete-fn",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        dependencies=[Depends(refuse_unknown_parameters)],
    )
    app.state.engines, app.state.metrics, app.state.rates = engines, Metrics(state), RateLimits(state.store)
    app.state.remote, app.state.internal = remote_of(state, maintenance), False
    add_refusals(app)
    app.add_middleware(Door, state=state, loopback=loopback)
    app.add_middleware(Bounds, upload_bytes=state.limits.upload_bytes, body_bytes=state.limits.body_bytes)
    app.add_middleware(RequestCounter, metrics=app.state.metrics)
    app.add_middleware(ClientPace)
    for router in ROUTERS:
        app.include_router(router)
    return app


def remote_of(state: ServiceState, maintenance: Maintenance | None) -> Proxy | None:
    """The proxy that passes chats on to the worker processes; None without worker processes."""
    if maintenance is None:
        return None
    secret = internal_secret(state.settings.internal_secret, state.settings.home)
    return Proxy(state, secret, maintenance.fleet.want if maintenance.fleet is not None else None)
