"""`POST /v1/estimate`: what a job would take, against what it then takes; nothing is kept and refusals are a job's."""

from __future__ import annotations

from decimal import Decimal

from tests.integration.server.conftest import Running
from tests.integration.server.test_server_jobs import ROWS, parquet_bytes, submit, upload, wait


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


def test_it_refuses_what_a_job_would(running: Running) -> None:
    with running.http() as client:
        file = upload(client, parquet_bytes(ROWS))
        for more, status in (({"model": "no"}, 404), ({"prompt": "{nothing}"}, 400), ({"options": {"top": 1}}, 400)):
            assert client.post("/v1/estimate", json={**asked(file), **more}).status_code == status
        assert client.post("/v1/estimate", json=asked("file-000000000000000000000000")).status_code == 404
