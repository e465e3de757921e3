"""What is really large: an upload beyond the limit, and a file of a million rows."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from complete_fn.service.state import Limits

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def zeros(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b"0" * 1_048_576


def test_an_upload_above_the_limit_leaves_nothing(running: Any) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'

    def body() -> Iterator[bytes]:
        yield head
        yield from zeros(202)

    with running.http() as client:
        reply = client.post("/v1/files", content=body(), headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")
        assert client.get("/healthz").status_code == 200
    assert running.state.limits == Limits()
    assert running.state.storage.keys() == []


def test_a_million_rows(running: Any) -> None:
    texts = [f"row {n}" for n in range(1_000_000)]
    content = io.BytesIO()
    parquet.write_table(pa.table({"id": np.arange(1_000_000), "text": texts}), content)
    with running.http() as client:
        sent = client.post(
            "/v1/files", files={"file": ("t.parquet", content.getvalue())}, data={"purpose": "user_data"}
        )
        body = {"model": "echo", "prompt": "{text}", "source": {"file_id": sent.json()["id"]}}
        job = client.post("/v1/jobs", json=body).json()
        assert job["rows"]["total"] == 1_000_000
        while (now := client.get(f"/v1/jobs/{job['id']}").json())["status"] in ("queued", "running"):
            time.sleep(2)
        assert now["rows"] == {"total": 1_000_000, "done": 1_000_000, "failed": 0, "null": 0}
        reply = client.get(f"/v1/jobs/{job['id']}/results")
    found = parquet.read_table(io.BytesIO(reply.content))
    assert found.column("completion").to_pylist() == texts
