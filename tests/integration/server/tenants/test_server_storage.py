"""A tenant keeps no more bytes than it may: uploads, jobs and call-outs beyond that are refused, results are kept."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from tests.integration.server.conftest import Running
from tests.integration.server.jobs.test_server_jobs import ROWS, parquet_bytes, results, submit, upload, wait

LINE = b'{"text": "a line of a file"}\n'


def told(reply: httpx.Response) -> str:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (403, "storage_full"), reply.text
    return str(error["message"])


def post_file(client: httpx.Client, content: bytes) -> httpx.Response:
    return client.post("/v1/files", files={"file": ("t.jsonl", content)}, data={"purpose": "user_data"})


def stored(running: Running) -> int:
    return sum(path.stat().st_size for path in running.state.folder.rglob("*") if path.is_file())


def jobs_in_storage(running: Running) -> list[str]:
    return running.state.storage.keys("jobs")


def test_an_upload_beyond_the_quota_is_refused_until_something_is_deleted(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPLETE_FN_TENANT_STORAGE", "10000")
    running = serve()
    mine, other = (running.state.keys.create(tenant, "u") for tenant in ("acme", "other"))
    six = LINE * (6000 // len(LINE))
    with running.http(mine) as client, running.http(other) as another:
        first = post_file(client, six)
        assert first.status_code == 200
        message = told(post_file(client, six))
        assert f"Storage of tenant 'acme': {len(six):,} bytes are used" in message
        assert "10,000 are allowed. Delete files (DELETE /v1/files/ID)" in message
        assert stored(running) == len(six)
        assert post_file(another, six).status_code == 200
        assert client.delete(f"/v1/files/{first.json()['id']}").status_code == 200
        assert post_file(client, six).status_code == 200
        running.state.keys.set_storage("acme", 100_000)
        assert post_file(client, six).status_code == 200


def test_what_is_counted_is_what_lies_in_the_storage(serve: Callable[..., Running]) -> None:
    running = serve()
    with running.http() as client:
        file = upload(client, parquet_bytes(ROWS))
        assert running.state.quota.state("local")[0] == stored(running) > 0
        job = wait(client, submit(client, file)["id"])
        assert running.state.quota.state("local")[0] == stored(running)
        client.delete(f"/v1/jobs/{job['id']}")
        client.delete(f"/v1/files/{file}")
    assert running.state.quota.state("local")[0] == stored(running) == 0


def test_a_job_beyond_the_quota_leaves_nothing_behind(serve: Callable[..., Running]) -> None:
    running = serve()
    with running.http() as client:
        file = upload(client, parquet_bytes(ROWS))
        used, _ = running.state.quota.state("local")
        running.state.keys.set_storage("local", used + 100)
        body = {"model": "echo", "prompt": "Say: {text}", "source": {"file_id": file}}
        assert f"{used:,} bytes are used" in told(client.post("/v1/jobs", json=body))
        assert jobs_in_storage(running) == []
        assert client.get("/v1/jobs").json()["data"] == []


def test_results_are_kept_beyond_the_quota_and_then_nothing_more_is_taken(serve: Callable[..., Running]) -> None:
    running = serve()
    with running.http() as client:
        file = upload(client, parquet_bytes(ROWS))
        job = wait(client, submit(client, file)["id"])
        answers = sum(path.stat().st_size for path in running.state.folder.rglob("result-*"))
        before_results = running.state.quota.state("local")[0] - answers
        client.delete(f"/v1/jobs/{job['id']}")
        running.state.keys.set_storage("local", before_results + 10)
        job = wait(client, submit(client, file)["id"])
        assert len(results(client, job["id"])) == len(ROWS)
        used, allowed = running.state.quota.state("local")
        assert used > allowed
        told(post_file(client, LINE))
        told(client.post("/v1/jobs", json={"model": "echo", "prompt": "{text}", "source": {"file_id": file}}))


def test_a_rerun_beyond_the_quota_is_refused(serve: Callable[..., Running]) -> None:
    running = serve()
    with running.http() as client:
        file = upload(client, parquet_bytes([{"text": "word " * 200}, {"text": "fine"}]))  # the first is too long
        job = wait(client, submit(client, file)["id"])
        assert job["rows"]["failed"] == 1
        running.state.keys.set_storage("local", 1)
        told(client.post(f"/v1/jobs/{job['id']}/rerun"))
        running.state.keys.set_storage("local", None)
        assert client.post(f"/v1/jobs/{job['id']}/rerun").status_code == 200
        wait(client, job["id"])


def test_a_call_out_beyond_the_quota_is_refused(serve: Callable[..., Running]) -> None:
    running = serve()
    body = {"model": "echo", "prompts": ["a"]}
    with running.http() as client:
        asked = {"url": "/v1/dialects/postgres/complete", "json": body}
        assert client.post(**asked, headers={"complete-batch-id": "b1"}).status_code == 200
        running.state.keys.set_storage("local", 1)
        running.state.quota.looked.clear()
        told(client.post(**asked, headers={"complete-batch-id": "b2"}))
        assert client.post(**asked, headers={"complete-batch-id": "b1"}).status_code == 200
