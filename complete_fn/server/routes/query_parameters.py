"""Query parameters that lists share, and the refusal of a parameter that its route does not have."""

from __future__ import annotations

import difflib
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Query, Request

from complete_fn.errors import UnknownParameterError

Limit = Annotated[int, Query(ge=1, le=1000)]
Instant = datetime | None
CreatedAfter = Annotated[Instant, Query(description="at this time or later: ISO 8601, UTC if it names no zone")]
CreatedBefore = Annotated[Instant, Query(description="before this time")]


def seconds_of(at: Instant) -> float | None:
    """Seconds of the epoch. A time without a zone is UTC, wherever the server stands."""
    if at is None:
        return None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


async def refuse_unknown_parameters(request: Request) -> None:
    """Refuse a misspelt filter, because a list without the filter looks like a right answer.

    Raises:
        UnknownParameterError: The route has no query parameter of this name.
    """
    if not request.query_params:
        return
    place = request.scope["route"].path_format
    known = parameters_of(request.app.openapi(), place, request.method)
    for name in request.query_params:
        if name not in known:
            raise UnknownParameterError(refusal_of(name, f"{request.method} {place}", known), name)


def parameters_of(document: dict[str, Any], place: str, method: str) -> list[str]:
    """The names of a route's query parameters, from the service's OpenAPI document."""
    found = document["paths"].get(place, {}).get(method.lower(), {})
    return sorted(p["name"] for p in found.get("parameters", ()) if p["in"] == "query")


def refusal_of(name: str, route: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{route} has no query parameter {name[:100]!r}.{hint} It takes {', '.join(known) or 'none'}."
