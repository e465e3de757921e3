"""Callers are authenticated by API key. On a loopback address without any key, every caller is the local tenant."""

from __future__ import annotations

import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

import anyio
from anyio import to_thread
from fastapi import Depends, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from complete_fn.errors import CompleteError, KeyRefusedError, ScopeError, StoreUpgradedError
from complete_fn.jobs.api_keys import REFUSED, Principal
from complete_fn.server.call_out_replies import PREFIX
from complete_fn.server.error_replies import of_complete_error
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from complete_fn.types import Asker

# The scope that a request needs, by the beginning of its path; /v1/models needs a key alone.
SCOPE_OF = {
    "/v1/chat/": "complete",
    "/v1/completions": "complete",
    PREFIX: "complete",
    "/v1/files": "jobs",
    "/v1/jobs": "jobs",
    "/v1/batches": "jobs",
    "/v1/estimate": "jobs",
    "/v1/usage": "usage",
    "/metrics": "metrics",
}
AT_ONCE = 16  # lookups of keys at a time, on threads of their own, so that slow routes cannot block them


# Dependencies are coroutines: a plain function would need a thread, and slow routes may hold all of them.
async def engines_of(request: Request) -> EngineHost:
    engines: EngineHost = request.app.state.engines
    return engines


async def state_of(request: Request) -> ServiceState:
    engines: EngineHost = request.app.state.engines
    return engines.state


async def principal(request: Request) -> Principal:
    found: Principal = request.state.principal
    return found


class Door:
    """Refuses callers of /v1/ and /metrics without a key or its scope, before a byte of the body is read."""

    def __init__(self, app: ASGIApp, state: ServiceState, loopback: bool) -> None:
        self.app = app
        self.state = state
        self.loopback = loopback
        self.limiter = anyio.CapacityLimiter(AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(("/v1/", "/metrics")):
            request = Request(scope)
            try:
                request.state.principal = await to_thread.run_sync(self.identify, request, limiter=self.limiter)
            except CompleteError as error:
                await (await of_complete_error(request, error))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def identify(self, request: Request) -> Principal:
        """Raises:
        KeyRefusedError: An API key is needed, and the request has none or an invalid one.
        ScopeError: The key was made without the scope that the request needs. Or no API key exists, and a web page
            sends the request under another site's name.
        StoreUpgradedError: A newer version has upgraded the store under this process.
        """
        if self.state.store.is_outdated:
            raise StoreUpgradedError
        found = self.caller(request)
        if (scope := scope_of(request.url.path)) is not None:
            found.require(scope)
        return found

    def caller(self, request: Request) -> Principal:
        if self.loopback and not self.state.keys.any():
            refuse_strange_pages(request)
            return Principal()
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise KeyRefusedError(REFUSED)
        return self.state.keys.check(key.strip())


def scope_of(path: str) -> str | None:
    return next((scope for start, scope in SCOPE_OF.items() if path.startswith(start)), None)


def refuse_strange_pages(request: Request) -> None:
    """Refuse web pages. Their visitor's browser could reach a loopback service, by the page's own name or origin."""
    origin = request.headers.get("origin")
    try:
        named = [request.url.hostname, *([urlsplit(origin).hostname] if origin else [])]
    except ValueError:  # the name is not valid in a URL
        named = [origin]
    if strange := [n for n in named if not is_loopback(n or "")]:
        raise ScopeError(f"Without API keys this service answers to localhost only, not to {strange[0]!r}.")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def asker(caller: Principal, job: str | None = None, query_tag: str | None = None) -> Asker:
    return Asker(caller.tenant, caller.user, job, query_tag)


EnginesOf = Annotated[EngineHost, Depends(engines_of)]
StateOf = Annotated[ServiceState, Depends(state_of)]
Caller = Annotated[Principal, Depends(principal)]
