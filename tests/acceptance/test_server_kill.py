"""`complete-fn serve` killed in the middle of a job: the next one goes on, and nothing is lost or paid twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from complete_fn.store.store import Store
from complete_fn.store.tables import attempts

MODELS = "[models.echo]\nengine = 'echo'\ncheckpoint = 'echo'\nprices = { input = 1, output = 2 }\n"


def start(home: Path, models: Path) -> tuple[subprocess.Popen[str], httpx.Client]:
    command = [str(Path(sys.executable).with_name("complete-fn")), "serve", "--port", "0", "--home", str(home)]
    environment = {**os.environ, "COMPLETE_FN_MODELS": str(models)}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert child.stderr is not None
    found = re.search(r"serves (http://\S+)/v1", child.stderr.readline())
    assert found
    return child, httpx.Client(base_url=found[1], timeout=100)


def state(client: httpx.Client, job: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/jobs/{job}").json()
    return found


@pytest.mark.parametrize(("size", "kills"), [(5_000, 1), pytest.param(40_000, 6, marks=pytest.mark.long)])
def test_a_killed_service_goes_on_with_its_jobs(tmp_path: Path, size: int, kills: int) -> None:
    home, models = tmp_path / "home", tmp_path / "models.toml"
    models.write_text(MODELS)
    child, client = start(home, models)
    lines = "\n".join(json.dumps({"id": n, "text": f"row number {n}"}) for n in range(size))
    file = client.post("/v1/files", files={"file": ("t.jsonl", lines)}, data={"purpose": "user_data"}).json()["id"]
    body = {"model": "echo", "prompt": "{text}", "source": {"file_id": file}}
    job = client.post("/v1/jobs", json=body).json()["id"]
    for kill in range(kills):
        while (now := state(client, job))["rows"]["done"] < (kill + 1) * size // (kills + 3):
            time.sleep(0.02)
        assert now["status"] == "running"
        child.send_signal(signal.SIGKILL)
        child.wait()
        client.close()
        child, client = start(home, models)
    deadline = time.monotonic() + 200
    while (now := state(client, job))["status"] != "completed" and time.monotonic() < deadline:
        time.sleep(0.1)
    rows = [json.loads(line) for line in client.get(f"/v1/jobs/{job}/results?format=jsonl").text.splitlines()]
    child.terminate()
    child.wait(100)
    assert rows == [{"id": n, "text": f"row number {n}", "completion": f"row number {n}"} for n in range(size)]
    assert now["rows"] == {"total": size, "done": size, "failed": 0, "null": 0}
    # Three words in and out of each row, once: billed tokens are those of the committed rows.
    assert Decimal(now["cost"]["amount"]) == Decimal(size * (3 * 1 + 3 * 2)) / 1_000_000
    store = Store(home / "state.sqlite3")
    with store.read() as connection:
        assert set(connection.execute(sa.select(attempts.c.status)).scalars()) == {"ended"}
    store.close()
