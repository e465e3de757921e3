"""Who is asking: by API key, or nobody in particular on a loopback address for which no key was ever made."""

from __future__ import annotations

import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request

from complete_fn.errors import KeyRefusedError, ScopeError
from complete_fn.key_store import REFUSED, Principal
from complete_fn.service import Service
from complete_fn.types import Asker


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def principal(request: Request) -> Principal:
    """Raises:
    KeyRefusedError: a key is needed and the one sent is none.
    ScopeError: without keys, a page in a browser asks under another site's name.
    """
    service = service_of(request)
    if request.app.state.loopback and not service.keys.any():
        refuse_strange_pages(request)
        return Principal()
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise KeyRefusedError(REFUSED)
    return service.keys.check(key.strip())


def refuse_strange_pages(request: Request) -> None:
    """A web page may reach a loopback service through its visitor's browser: by its own name, or under its origin."""
    origin = request.headers.get("origin")
    named = [request.url.hostname, *([urlsplit(origin).hostname] if origin else [])]
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


ServiceOf = Annotated[Service, Depends(service_of)]
Caller = Annotated[Principal, Depends(principal)]
