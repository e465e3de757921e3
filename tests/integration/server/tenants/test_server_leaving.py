"""What a request makes the service compute ends when its client leaves, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from complete_fn import interrupts
from complete_fn.interrupts import Abandoned
from complete_fn.server.routes.jobs import estimate, jobs
from complete_fn.service import results, submit
from tests.integration.server.conftest import Running
from tests.integration.server.jobs.test_server_jobs import upload
from tests.integration.server.tenants.test_server_neighbours import until

ROWS, WINDOW, LEAVES_AT = 500, 10, 3  # rows of the table, rows of a window, windows before the client leaves
NEVER = {
    "postgresql": "SELECT count(*) AS text FROM generate_series(1, 100000000000) a",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) AS text FROM n",
}
Outcomes = list[BaseException | None]


@contextlib.contextmanager
def asked(running: Running, path: str, body: dict[str, Any]) -> Iterator[None]:
    """A client that sends a request and is gone when the block ends."""
    at, content = urlsplit(running.url), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((at.hostname, at.port)) as link:
        link.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield


def observed(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> Outcomes:
    """How the calls of a function end: with None, or an exception."""
    found: Outcomes = []
    function = getattr(place, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        try:
            result = function(*arguments, **named)
        except BaseException as error:
            found.append(error)
            raise
        found.append(None)
        return result

    monkeypatch.setattr(place, name, wrapped)
    return found


def slowed(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[int]:
    """Make call number `LEAVES_AT` of a function wait until the service knows that its client is gone."""
    calls: list[int] = []
    function = getattr(place, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == LEAVES_AT:
            gone = interrupts.GONE.get()
            assert gone is not None
            assert gone.wait(60)
        return function(*arguments, **named)

    monkeypatch.setattr(place, name, wrapped)
    return calls


def request_of(running: Running) -> dict[str, Any]:
    with running.http() as client:
        file = upload(client, b"".join(b'{"text": "row %d"}\n' % n for n in range(ROWS)), "t.jsonl")
    return {"model": "echo", "prompt": "{text}", "source": {"file_id": file}}


@pytest.mark.parametrize("slow", ["write_window", "write_parts"])
def test_a_submission_ends_when_its_client_leaves(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    monkeypatch.setattr("complete_fn.rows.readers.WINDOW_ROWS", WINDOW)
    running = serve()
    body = request_of(running)
    before = running.state.storage.keys()
    calls = slowed(monkeypatch, submit, slow)
    outcomes = observed(monkeypatch, jobs, "submit_table")
    with asked(running, "/v1/jobs", body):
        until(lambda: len(calls) == LEAVES_AT)
    until(lambda: outcomes)
    assert [type(outcome) for outcome in outcomes] == [Abandoned]
    assert len(calls) == LEAVES_AT
    assert running.state.storage.keys() == before
    with running.http() as client:
        assert client.get("/v1/jobs").json()["data"] == []


def test_an_estimate_ends_when_its_client_leaves(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("complete_fn.rows.readers.WINDOW_ROWS", WINDOW)
    running = serve()
    body = request_of(running)
    calls = slowed(monkeypatch, estimate, "window_prompts")
    with asked(running, "/v1/estimate", body):
        until(lambda: len(calls) == LEAVES_AT)
    with running.http() as client:  # the tables' slots are free again
        for _ in range(3):
            assert client.post("/v1/estimate", json=body).status_code == 200
    assert len(calls) == LEAVES_AT + 3 * ROWS // WINDOW


def test_reading_results_ends_when_its_client_leaves(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("complete_fn.rows.readers.WINDOW_ROWS", WINDOW)
    running = serve()
    body = request_of(running)
    with running.http() as client:
        job = client.post("/v1/jobs", json=body).json()["id"]
        until(lambda: client.get(f"/v1/jobs/{job}").json()["status"] == "completed")
    calls = slowed(monkeypatch, results, "details_of")
    outcomes = observed(monkeypatch, jobs, "write_results")
    at = urlsplit(running.url)
    with socket.create_connection((at.hostname, at.port)) as link:
        link.sendall(f"GET /v1/jobs/{job}/results HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        until(lambda: len(calls) == LEAVES_AT)
    until(lambda: outcomes)
    assert [type(outcome) for outcome in outcomes] == [Abandoned]
    assert len(calls) == LEAVES_AT


@pytest.mark.parametrize("kind", NEVER)
def test_a_query_on_a_connection_ends_when_its_client_leaves(
    serve: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
) -> None:
    url = f"sqlite:///{tmp_path / 'docs.db'}" if kind == "sqlite" else request.getfixturevalue("postgres_url")
    monkeypatch.setenv("DOCS_URL", url)
    running = serve()
    running.state.connections.add("local", "docs", "DOCS_URL", False)
    outcomes = observed(monkeypatch, jobs, "submit_table")
    body = {"model": "echo", "prompt": "{text}", "source": {"connection": "docs", "sql": NEVER[kind]}}
    with asked(running, "/v1/jobs", body):
        until(lambda: under_way(url))
    until(lambda: outcomes)
    assert [type(outcome) for outcome in outcomes] == [Abandoned]
    assert not under_way(url)


def under_way(url: str) -> int:
    """Queries that a database runs for jobs: its sessions in PostgreSQL, else our own processes."""
    if url.startswith("sqlite"):
        found = 0
        for listed in Path("/proc/self/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread or a child that has ended meanwhile
                found += sum(
                    b"query_process" in Path(f"/proc/{p}/cmdline").read_bytes() for p in listed.read_text().split()
                )
        return found
    with psycopg.connect(url) as connection:
        mine = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%rows_of_job%'"
        row = connection.execute(f"{mine} AND pid <> pg_backend_pid()").fetchone()
        assert row is not None
        return int(row[0])
