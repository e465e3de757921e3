"""`POST /v1/estimate`: what a job would take, against what it then takes; nothing is kept and refusals are a job's."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import httpx
import pytest

from complete_fn.service.sources import open_source
from tests.integration.server.conftest import Running
from tests.integration.server.jobs.test_server_jobs import ROWS, parquet_bytes, submit, upload, wait


def asked(file: str, **more: object) -> dict[str, object]:
    return {"model": "echo", "prompt": "Say: {text}", "source": {"file_id": file}, **more}


def test_the_estimate_of_a_job_comes_true_and_keeps_nothing(running: Running) -> None:
    with running.http() as client:
        file = upload(client, parquet_bytes(ROWS))
        body = asked(file, options={"max_tokens": 8})
        before = client.post("/v1/estimate", json=body).json()
        assert (before["rows"], before["nulls"], before["distinct"], before["known_rows"]) == (100, 10, 7, 0)
        assert before["completion_tokens_at_most"] == 7 * 8
        assert client.get("/v1/jobs").json()["data"] == []
        job = wait(client, submit(client, file, options={"max_tokens": 8})["id"])
        assert Decimal(job["cost"]["amount"]) <= Decimal(before["cost_at_most"])
        after = client.post("/v1/estimate", json=body).json()
        assert (after["known_rows"], after["prompts"], Decimal(after["cost"])) == (90, 0, 0)
        assert "known answers  90 rows" in after["report"]


def test_one_tenants_tables_keep_nobody_waiting(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def slow(*given: Any) -> Any:
        gate.wait(60)
        return open_source(*given)

    monkeypatch.setattr("complete_fn.server.routes.jobs.estimate.open_source", slow)
    busy, other = (running.state.keys.create(tenant, "ann") for tenant in ("busy", "other"))
    with running.http(busy) as client:
        body = asked(upload(client, parquet_bytes(ROWS)))
    with ThreadPoolExecutor(45) as pool, running.http(other) as client:

        def estimated() -> httpx.Response:
            with running.http(busy) as mine:
                return mine.post("/v1/estimate", json=body)

        waiting = [pool.submit(estimated) for _ in range(45)]
        try:
            time.sleep(2)
            chat = {"model": "echo", "messages": [{"role": "user", "content": "x"}]}
            assert client.post("/v1/chat/completions", json=chat, timeout=5).status_code == 200
            assert client.get("/v1/jobs", timeout=5).status_code == 200
            assert client.get("/readyz", timeout=5).status_code == 200
        finally:
            gate.set()
        replies = [found.result(120) for found in waiting]
    assert Counter(reply.status_code for reply in replies) == {200: 34, 429: 11}  # 2 at a time, 32 that wait
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert "32 requests wait already. They read or write tables" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) > 0


def test_it_refuses_what_a_job_would(running: Running) -> None:
    with running.http() as client:
        file = upload(client, parquet_bytes(ROWS))
        for more, status in (({"model": "no"}, 404), ({"prompt": "{nothing}"}, 400), ({"options": {"top": 1}}, 400)):
            assert client.post("/v1/estimate", json={**asked(file), **more}).status_code == status
        assert client.post("/v1/estimate", json=asked("file-000000000000000000000000")).status_code == 404
