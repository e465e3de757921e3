"""`/v1/estimate` tells what a job would take, before it is submitted. It keeps nothing and starts no engine."""

from __future__ import annotations

from typing import Annotated, Any

import pyarrow as pa
from fastapi import APIRouter
from pydantic import ConfigDict, Field

from complete_fn.engines.call import Call
from complete_fn.estimates.estimate import estimate
from complete_fn.estimates.estimate_report import as_values, report
from complete_fn.prompts.options import parse_options
from complete_fn.prompts.schema_rules import refuse_patterns
from complete_fn.prompts.table_prompts import ESTIMATE_PROMPT_BYTES, TablePrompts
from complete_fn.prompts.templates import refuse_missing, template_fields
from complete_fn.server.auth import Caller, StateOf
from complete_fn.server.fair_slots import LanesOf
from complete_fn.server.request_bodies import Body
from complete_fn.server.routes.jobs.jobs import EXAMPLE, SourceBody
from complete_fn.service.sources import open_source
from complete_fn.service.submit import source_for, window_prompts
from complete_fn.types import Asker

router = APIRouter(tags=["jobs"])
A_SAMPLE = "Estimate a sample of the table."


class EstimateBody(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})
    model: str
    prompt: Annotated[str, Field(description="as in `/v1/jobs`")]
    source: SourceBody
    options: dict[str, Any] = Field(default_factory=dict, description="as in `/v1/jobs`")


@router.post("/v1/estimate", summary="What a job over a table would take")
async def post_estimate(body: EstimateBody, state: StateOf, caller: Caller, lanes: LanesOf) -> dict[str, Any]:
    """Rows, tokens, cached share, price and device-seconds; `report` is the same as text. Refuses what a job would."""
    options = parse_options(body.options)
    refuse_patterns(options.response_format)
    call = Call.of(state.model(body.model), options)

    def work() -> dict[str, Any]:
        made = TablePrompts(body.prompt, options.reorder_fields, ESTIMATE_PROMPT_BYTES, A_SAMPLE)
        source, chunks = source_for(open_source(state, caller.tenant, body.source.chosen()), made), []
        names: set[str] = set()
        for rows in source.windows():
            chunks += window_prompts(made, rows).chunks
            names.update(rows.names)
        refuse_missing(template_fields(body.prompt), sorted(names))
        prompts = pa.chunked_array(chunks, pa.large_string())
        found = estimate(call, prompts, state.store, Asker(caller.tenant, caller.user), options.cache)
        return {"object": "estimate", **as_values(found), "report": report(found)}

    return await lanes.tables.run(caller.tenant, work)
