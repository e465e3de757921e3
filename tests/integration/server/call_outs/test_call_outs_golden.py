"""What the service answers to the call-outs of warehouses, kept in tests/golden/api."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.api_recorder import WAREHOUSES, Moody, Recorder
from tests.integration.server.conftest import Running

pytestmark = pytest.mark.usefixtures("plain_settings")


def call_out(warehouse: str, rows: list[list[Any]], batch: str) -> dict[str, Any]:
    """What httpx sends for a warehouse's batch of rows."""
    if warehouse == "snowflake":
        headers = {"sf-external-function-query-batch-id": batch, "sf-external-function-current-query-id": "q-1"}
        return {"json": {"data": [[n, *row] for n, row in enumerate(rows)]}, "headers": headers}
    if warehouse == "bigquery":
        return {"json": {"requestId": batch, "caller": "//bigquery/jobs/j-1", "calls": rows}}
    if warehouse == "redshift":
        body = {"request_id": batch, "query_id": 7, "num_records": len(rows), "arguments": rows}
        return {"json": body, "headers": {"complete-batch-id": batch}}
    body = {"model": rows[0][0], "prompts": [row[1] for row in rows], "query_tag": "t"}
    options = rows[0][2] if len(rows[0]) > 2 else None
    return {"json": body | ({} if options is None else {"options": options}), "headers": {"complete-batch-id": batch}}


@pytest.mark.parametrize("warehouse", WAREHOUSES)
def test_call_outs(record: Recorder, warehouse: str) -> None:
    place = f"/v1/dialects/{warehouse}"

    def post(function: str, **given: Any) -> None:
        """PostgreSQL's are sent away after half a second, which may be too short on a busy machine: sent again."""
        until = time.monotonic() + 60
        while warehouse == "postgres" and time.monotonic() < until:
            if record.http.post(f"{place}/{function}", **given).status_code != 202:
                break
        record.ask(f"POST {place}/{function}", **given)

    rows: list[list[Any]] = [["echo", "one two"], ["echo", None], ["echo", "bad"], ["echo", "one two"]]
    first = call_out(warehouse, rows, "b1")
    post("complete", **first)
    post("complete", **first)  # sent again
    post("complete_details", **call_out(warehouse, rows, "b2"))
    post("complete", **call_out(warehouse, [["echo", "a b c", {"max_tokens": 2}]], "b3"))
    messages = [{"role": "user", "content": "said"}]
    post("complete", **call_out(warehouse, [["echo", messages]], "b4"))
    headers = first.get("headers", {})
    record.ask(f"GET {place}/complete", headers=headers)
    record.ask(f"DELETE {place}/complete", headers=headers)
    record.ask(f"GET {place}/complete", headers=headers)
    record.ask(f"GET {place}/complete")
    post("complete", **call_out(warehouse, [["nothing", "x"]], "b5"))
    post("complete", **call_out(warehouse, [["echo", "x", {"temperature": 9}]], "b6"))
    post("complete", **call_out(warehouse, [["echo", "x", "no json"]], "b7"))
    post("complete", **call_out(warehouse, [["echo", {"a": 1}]], "b8"))
    post("complete", **call_out(warehouse, [["echo", "down"]], "b9"))
    post("complete", **call_out(warehouse, [["echo", "x"]], ""))
    post("complete", content=b"{", headers=headers)
    post("complete", content=b"[]", headers=headers)
    post("complete", content=b"{}", headers=headers)
    post("complete", content=b"no gzip", headers=headers | {"Content-Encoding": "gzip"})
    post("complete_other", json={})
    if warehouse == WAREHOUSES[0]:
        record.ask("POST /v1/dialects/oracle/complete", json={})
    record.check(f"call_outs_{warehouse}")


def test_a_call_out_that_takes_long(serve: Callable[..., Running]) -> None:
    engine = Moody()
    with serve(engine).http() as http:
        record, place = Recorder(http), "/v1/dialects/postgres/complete"
        given = call_out("postgres", [["echo", "held"]], "b1")
        record.ask(f"POST {place}", **given)
        record.ask(f"GET {place}", headers=given["headers"])
        engine.gate.set()
        until = time.monotonic() + 60
        while http.get(place, headers=given["headers"]).status_code == 202 and time.monotonic() < until:
            pass
        record.ask(f"GET {place}", headers=given["headers"])
        record.check("call_outs_slow")
