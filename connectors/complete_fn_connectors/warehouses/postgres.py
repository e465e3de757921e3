"""The requests of our own PostgreSQL functions (`sql/complete_fn_sql/postgres/`): one model and one set of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from complete_fn.errors import CompleteError, InputError
from complete_fn.service.call_out import CallOut, Reply, batch_name, body_object, json_reply, rows_of

BATCH = "complete-batch-id"


class Postgres:
    """The dialect of our PostgreSQL functions. A statement asks again often, as it can be cancelled only between
    requests."""

    seconds = 86_400.0
    patience = 0.5

    def batch(self, headers: Mapping[str, str]) -> str:
        if BATCH not in headers:
            raise InputError(f"The header {BATCH} is missing.")
        return batch_name(headers[BATCH])

    def read(self, body: bytes, headers: Mapping[str, str]) -> CallOut:
        found = body_object(body, 'write {"model": "...", "prompts": ["...", ...]}')
        model, options = found.get("model"), found.get("options")
        rows = [[model, prompt, options] for prompt in rows_of(found, "prompts")]
        tag = found.get("query_tag")
        return CallOut(self.batch(headers), rows, query_tag=tag[:255] if isinstance(tag, str) else None)

    def write(self, asked: CallOut, values: Sequence[Any]) -> Reply:
        return json_reply(200, {"values": list(values)})

    def refuse(self, error: CompleteError) -> Reply:
        return json_reply(error.status, {"error": {"message": str(error), "code": error.code}})

    def busy(self, batch: str) -> Reply:
        return json_reply(202, {"batch": batch})
