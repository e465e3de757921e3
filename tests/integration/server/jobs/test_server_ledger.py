"""How soon the ledger knows of a row."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from complete_fn import EchoEngine
from complete_fn.types import Completion, CompletionRequest
from tests.integration.server.jobs.test_server_jobs import parquet_bytes, submit, upload

VISIBLE_SECONDS = 6.0


def test_a_row_is_in_the_ledger_within_seconds_of_its_end(serve: Callable[..., Any]) -> None:
    ended: list[float] = []

    class Slow(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            found = super().complete(request)
            ended.append(time.monotonic())
            return found

    running = serve(Slow(64, row_seconds=0.4))
    lags: list[float] = []
    with running.http() as client:
        job = submit(client, upload(client, parquet_bytes([{"text": f"word {n}"} for n in range(25)])))["id"]
        deadline = time.monotonic() + 120
        while len(lags) < 25 and time.monotonic() < deadline:
            lines = client.get("/v1/usage", params={"by": "job"}).json()["data"]
            seen = sum(line["rows"] for line in lines if line["job"] == job)
            now = time.monotonic()
            lags += [now - at for at in ended[len(lags) : seen]]
            time.sleep(0.1)
    assert len(lags) == 25
    assert max(lags) < VISIBLE_SECONDS
    assert any(at < ended[-1] - 1 for at in (end + lag for end, lag in zip(ended, lags, strict=True)))  # while it runs
