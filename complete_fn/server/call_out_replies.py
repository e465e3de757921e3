"""Replies have the form of the warehouse that asks, even if the request is refused at the door."""

from __future__ import annotations

from functools import cache

from fastapi.responses import Response

from complete_fn.errors import CompleteError, RateLimitError
from complete_fn.registry import DIALECTS, resolve
from complete_fn.service.call_out import Dialect, Reply

PREFIX = "/v1/dialects/"


@cache
def dialect_of(name: str) -> Dialect:
    found: Dialect = resolve(DIALECTS[name])()
    return found


def response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, dict(reply.headers))


def refused(translator: Dialect, error: CompleteError) -> Response:
    """The reply that tells why there are no values. A rate limit adds its own headers, with the wait."""
    found = response(translator.refuse(error))
    if isinstance(error, RateLimitError):
        found.headers.update(error.headers)
    if error.status == 401:
        found.headers["WWW-Authenticate"] = "Bearer"
    return found


def refused_at(path: str, error: CompleteError) -> Response | None:
    """The refusal of a request for this path, in its dialect; None if the path belongs to no dialect."""
    name = path.removeprefix(PREFIX).partition("/")[0] if path.startswith(PREFIX) else ""
    return refused(dialect_of(name), error) if name in DIALECTS else None
