"""`/v1/usage` sums the tenant's lines of the ledger."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from complete_fn.errors import InvalidOptionError
from complete_fn.ledger.usage import GROUPS, UsageLine, usage
from complete_fn.server.auth import Caller, StateOf
from complete_fn.server.fair_slots import LanesOf
from complete_fn.server.routes.query_parameters import Instant, seconds_of

router = APIRouter(tags=["usage"])


@router.get("/v1/usage", summary="Rows, tokens and cost of the tenant, by day and model")
async def get_usage(
    state: StateOf,
    caller: Caller,
    lanes: LanesOf,
    by: Annotated[str, Query(description=f"one or more of {', '.join(GROUPS)}, with commas")] = "day,model",
    since: Annotated[Instant, Query(description="ISO 8601, UTC if it names no zone; all time if not given")] = None,
    until: Annotated[Instant, Query(description="before this time; up to now if not given")] = None,
) -> dict[str, Any]:
    names = by.split(",")
    if wrong := [name for name in names if name not in GROUPS]:
        raise InvalidOptionError(f"by = {wrong[0]!r} is not one of {', '.join(GROUPS)}.")
    first, last = seconds_of(since) or 0.0, seconds_of(until)
    lines = await lanes.reports.run(caller.tenant, lambda: usage(state.store, names, first, caller.tenant, last))
    return {"object": "list", "data": [line_body(names, line) for line in lines]}


def line_body(names: list[str], line: UsageLine) -> dict[str, Any]:
    return {
        **dict(zip(names, line.group, strict=True)),
        "rows": line.rows,
        "input_tokens": line.input,
        "cached_tokens": line.cached,
        "output_tokens": line.output,
        "cost": f"{line.cost:f}",
        "saved": f"{line.saved:f}",
        "currency": line.currency,
        "basis": line.basis,
        "lost_rows": line.lost_rows,
        "lost_tokens": line.lost_tokens,
        "cache_saved": f"{line.cache_saved:f}",
        "device_seconds": line.device_seconds,
        "saved_seconds": line.saved_seconds,
    }
