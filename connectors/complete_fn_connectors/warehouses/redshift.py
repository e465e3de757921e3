"""Redshift's Lambda UDFs: https://docs.aws.amazon.com/redshift/latest/dg/udf-creating-a-lambda-sql-udf.html.

Redshift calls a Lambda function and no URL; `deploy/redshift/forwarder.py` is that function and passes the event on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from complete_fn.errors import CompleteError, InputError
from complete_fn.service.call_out import CallOut, Reply, batch_name, body_object, for_good, json_reply, rows_of

BATCH = "complete-batch-id"


class Redshift:
    """The dialect of Redshift. A Lambda function runs for 15 minutes at most; after a 202 the forwarder asks again with
    GET."""

    seconds = 840.0
    patience = 20.0

    def batch(self, headers: Mapping[str, str]) -> str:
        if BATCH not in headers:
            raise InputError(f"The header {BATCH} is missing; it is the event's request_id.")
        return batch_name(headers[BATCH])

    def read(self, body: bytes, headers: Mapping[str, str]) -> CallOut:
        found = body_object(body, "send Redshift's event as it is")
        rows = rows_of(found, "arguments")
        if found.get("num_records") != len(rows):
            raise InputError(f"num_records is {found.get('num_records')!r}, but there are {len(rows):,} rows.")
        query = found.get("query_id")
        tag = str(query) if isinstance(query, int) else None
        return CallOut(batch_name(found.get("request_id")), rows, query_tag=tag)

    def write(self, asked: CallOut, values: Sequence[Any]) -> Reply:
        """Details are JSON text: a Lambda UDF returns no SUPER. JSON_PARSE reads it."""
        results = [json.dumps(v, ensure_ascii=False) if isinstance(v, dict) else v for v in values]
        return json_reply(200, {"success": True, "num_records": len(results), "results": results})

    def refuse(self, error: CompleteError) -> Reply:
        """The forwarder reads the status: it tries 429 and 5xx again, and gives Redshift the body of other replies."""
        return json_reply(for_good(error), {"success": False, "error_msg": str(error)})

    def busy(self, batch: str) -> Reply:
        return json_reply(202, {"batch": batch})
