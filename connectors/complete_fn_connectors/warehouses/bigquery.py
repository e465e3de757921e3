"""BigQuery's remote functions: https://cloud.google.com/bigquery/docs/remote-functions.

A request has about 256 KiB, often one row or few, and a query sends many at the same time: the service merges them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from complete_fn.errors import CompleteError, InputError
from complete_fn.service.call_out import CallOut, Reply, batch_name, body_object, for_good, json_reply, rows_of

MOST_BYTES = 14_000_000  # BigQuery refuses replies above 15 MB
RETRY = {"Retry-After": "5"}


class BigQuery:
    """The dialect of BigQuery. BigQuery waits 20 minutes for a reply and knows no 202, so a request waits for its
    rows."""

    seconds = 1_100.0
    patience = 1_140.0

    def batch(self, headers: Mapping[str, str]) -> str:
        raise InputError("BigQuery sends POST only; the reply to it has the values.")

    def read(self, body: bytes, headers: Mapping[str, str]) -> CallOut:
        """A request is named by its id and its rows: BigQuery does not say whether ids are used again."""
        found = body_object(body, 'write {"requestId": "...", "calls": [[model, prompt], ...]}')
        rows = rows_of(found, "calls")
        caller = found.get("caller")
        tag = caller[-255:] if isinstance(caller, str) else None
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]
        return CallOut(f"{batch_name(found.get('requestId'))}:{digest}", rows, query_tag=tag)

    def write(self, asked: CallOut, values: Sequence[Any]) -> Reply:
        """Details are JSON text, which PARSE_JSON reads; a remote function returns neither STRUCT nor ARRAY."""
        replies = [json.dumps(v, ensure_ascii=False) if isinstance(v, dict) else v for v in values]
        reply = json_reply(200, {"replies": replies})
        if len(reply.body) > MOST_BYTES:
            message = f"The answers have {len(reply.body):,} bytes; BigQuery takes 15 MB. Lower max_batching_rows."
            return json_reply(400, {"errorMessage": message})
        return reply

    def refuse(self, error: CompleteError) -> Reply:
        """BigQuery tries 503 again and fails the query at 400. An error that another try would meet again must be
        400."""
        status = for_good(error)
        if status in (401, 403):
            return json_reply(status, {"errorMessage": str(error)})
        if status < 429:
            return json_reply(400, {"errorMessage": str(error)})
        return json_reply(503, {"errorMessage": str(error)}, RETRY)

    def busy(self, batch: str) -> Reply:
        """Another process of the service runs the same request."""
        return json_reply(503, {"errorMessage": f"Request {batch} is still running."}, RETRY)
