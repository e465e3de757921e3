"""Snowflake's external functions, and the service functions of its container services, which send the same bodies.

Format: https://docs.snowflake.com/en/sql-reference/external-functions-data-format; retries, 202 and the batch id:
https://docs.snowflake.com/en/sql-reference/external-functions-implementation.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from complete_fn.errors import CompleteError, InputError
from complete_fn.service.call_out import CallOut, Reply, batch_name, body_object, for_good, json_reply, rows_of

BATCH = "sf-external-function-query-batch-id"
QUERY = "sf-external-function-current-query-id"


class Snowflake:
    """The dialect of Snowflake. A query fails if a batch takes more than 600 s, and a gateway holds a request about 29
    s."""

    seconds = 540.0
    patience = 20.0

    def batch(self, headers: Mapping[str, str]) -> str:
        if BATCH not in headers:
            raise InputError(f"The header {BATCH} is missing; the gateway must pass it on.")
        return batch_name(headers[BATCH])

    def read(self, body: bytes, headers: Mapping[str, str]) -> CallOut:
        """Rows are [number, argument, ...]. The numbers come in any order and go back as they came."""
        rows = rows_of(body_object(body, 'write {"data": [[0, model, prompt], ...]}'), "data")
        numbers = []
        for place, row in enumerate(rows):
            if not isinstance(row, list) or not row or isinstance(row[0], bool) or not isinstance(row[0], int):
                raise InputError(f"data[{place}] does not begin with a row number.")
            numbers.append(row[0])
        if len(set(numbers)) != len(numbers):
            raise InputError("Two rows have the same row number.")
        return CallOut(self.batch(headers), [row[1:] for row in rows], numbers, headers.get(QUERY))

    def write(self, asked: CallOut, values: Sequence[Any]) -> Reply:
        reply = json_reply(200, {"data": [list(pair) for pair in zip(asked.numbers, values, strict=True)]})
        digest = base64.b64encode(hashlib.md5(reply.body, usedforsecurity=False).digest()).decode()
        return Reply(200, reply.body, {**reply.headers, "Content-MD5": digest})

    def refuse(self, error: CompleteError) -> Reply:
        """Snowflake tries 429 and 5xx again with the same batch id. Other statuses fail the query with this body."""
        status = for_good(error)
        headers = {"Retry-After": "2"} if status in (429, 503) else {}
        return json_reply(status, {"error": str(error)}, headers)

    def busy(self, batch: str) -> Reply:
        return json_reply(202, {"batch": batch})
