"""A worker serves the OpenAI routes to API processes only, on its own address, protected by a shared secret.

The API names the tenant and user. It has checked API key and scope, and counted the tokens per minute. The worker does
budget, answers and ledger, in the store that both share.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from complete_fn.errors import EngineError
from complete_fn.host import raise_file_limit
from complete_fn.jobs.api_keys import NAME, Principal
from complete_fn.server.connection_guard import ClientPace, bounds_within, make_server, run_server
from complete_fn.server.error_replies import Bounds, add_refusals, refusal
from complete_fn.server.fair_slots import Lanes
from complete_fn.server.rate_limits import RateLimits
from complete_fn.server.routes.openai import completions as routes_completions
from complete_fn.server.worker_proxy import TENANT, USER
from complete_fn.service.engine_host import EngineHost

START_SECONDS = 30.0


class InternalDoor:
    """Admits requests that have the secret, for the tenant and user that their headers name."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self.app = app
        self.expected = f"Bearer {secret}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            given = request.headers.get("authorization", "").encode("latin-1", "replace")
            tenant, user = request.headers.get(TENANT, ""), request.headers.get(USER, "")
            if not hmac.compare_digest(given, self.expected) or not (NAME.fullmatch(tenant) and NAME.fullmatch(user)):
                await refusal(401, "This address is the service's own. Ask its API.", "invalid_api_key")(
                    scope, receive, send
                )
                return
            request.state.principal = Principal(tenant, user)
        await self.app(scope, receive, send)


def internal_app(engines: EngineHost, secret: str) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.lanes = Lanes()
        yield

    app = FastAPI(title="complete-fn worker", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.engines, app.state.rates, app.state.remote, app.state.internal = (
        engines,
        RateLimits(engines.state.store),
        None,
        True,
    )
    add_refusals(app)
    app.add_middleware(InternalDoor, secret=secret)
    app.add_middleware(Bounds, upload_bytes=0, body_bytes=engines.state.limits.body_bytes)
    app.add_middleware(ClientPace)
    app.include_router(routes_completions.router)
    return app


class Internal:
    """A server in a thread of this process.

    Attributes:
        address: the URL that the heartbeat announces; with the machine's name if the server listens on all interfaces.
    """

    def __init__(self, engines: EngineHost, host: str, secret: str) -> None:
        kind, _, _, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(kind, socket.SOCK_STREAM)
        listener.bind(place)
        listener.listen(256)
        everywhere = host in ("0.0.0.0", "::")
        shown = socket.gethostname() if everywhere else f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{listener.getsockname()[1]}"
        self.server = make_server(internal_app(engines, secret))
        serving = (self.server, listener, bounds_within(raise_file_limit()))
        self.thread = threading.Thread(target=run_server, args=serving, name="internal", daemon=True)
        self.thread.start()
        until = time.monotonic() + START_SECONDS
        while not self.server.started:
            if not self.thread.is_alive() or time.monotonic() > until:
                raise EngineError(f"The worker cannot serve on {self.address}. Give another --internal-host.")
            time.sleep(0.01)

    def close(self) -> None:
        """Stop the server. Requests under way have `START_SECONDS` to end."""
        self.server.should_exit = True
        self.thread.join(START_SECONDS)


def serve_internal(engines: EngineHost, host: str, secret: str) -> Internal:
    """Serve the OpenAI routes on a free port of `host`, to callers that have the secret.

    Raises:
        EngineError, OSError: The server cannot listen on the address.
    """
    return Internal(engines, host, secret)


def internal_secret(given: str | None, home: Path) -> str:
    """The secret of API and workers: the given one, or else one in a file of the state folder that they share."""
    if given:
        return given
    file = home / "internal.secret"
    with suppress(FileExistsError):
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = home / f"internal.{secrets.token_hex(4)}"
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(32))
        try:
            os.link(new, file)  # atomic: the file appears with its whole content, or another process was first
        finally:
            new.unlink()
    return file.read_text().strip()
