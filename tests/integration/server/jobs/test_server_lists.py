"""Lists of jobs, batches and files: filters, and a number of statements that does not grow with the list."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest
import sqlalchemy as sa

from complete_fn import Client, EchoEngine
from complete_fn.cli.main import main
from complete_fn.jobs.job import JOB_MOVES
from complete_fn.jobs.part_queue import worker_name
from complete_fn.server.routes.jobs.jobs import JobStatus
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.sinks import promise
from complete_fn.service.state import ServiceState
from complete_fn.store.records import LedgerLine
from complete_fn.types import Asker
from complete_fn.worker.maintenance import Maintenance
from tests.integration.server.conftest import at_service
from tests.unit.jobs.test_jobs import PIECE, job

BEGAN = 1_767_222_000  # 2025-12-31T23:00Z


@pytest.fixture
def idle(store_url: str, tmp_path: Path, models_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A service without workers: its jobs stay as the test makes them."""
    if store_url.startswith("postgresql"):
        monkeypatch.setenv("COMPLETE_FN_DATABASE", store_url)
    engines = EngineHost(ServiceState(tmp_path / "home", models_file, EchoEngine(64)))
    with at_service(engines, maintenance=Maintenance(engines)) as running:
        yield running


def make_job(running: Any, number: int, begun: int = 0, ends: bool = False, **more: Any) -> str:
    """A job of three parts, of which `begun` have committed 4 of their 10 rows; with `ends` these parts are done."""
    store, queue, name = running.state.store, running.state.parts, f"job_{number:024d}"
    of_job = {"tenant": "local", "model": "echo", "rows": 30, "priority": number, "created_at": float(BEGAN + number)}
    made = job(name, **{**of_job, **more})  # by its priority the newest job is begun first
    running.state.jobs.create(made, [PIECE | {"model": "echo"}] * 3 if more.get("kind") != "batch" else [])
    for _ in range(begun):
        part = queue.claim(worker_name(9))
        assert part is not None
        attempt = store.begin(Asker("local", job=part.name), "m", "USD", "example")
        store.commit(attempt, [], [LedgerLine("input", 4, 40, 7), LedgerLine("output", 4, 12, 9)], 0, 0)
        store.finish(attempt, "done")
        if ends:
            queue.finish(part, "done", "r", 1)
    return name


def statements(running: Any, client: Any, url: str, mark: str) -> tuple[int, list[dict[str, Any]]]:
    """How many statements the thread executed that also executed the one with `mark`, and the list."""
    asked: list[tuple[int, str]] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        asked.append((threading.get_ident(), statement))

    sa.event.listen(running.state.store.engine, "before_cursor_execute", note)
    try:
        reply = client.get(url)
    finally:
        sa.event.remove(running.state.store.engine, "before_cursor_execute", note)
    assert reply.status_code == 200, reply.text
    (thread,) = {thread for thread, statement in asked if mark in statement}
    found: list[dict[str, Any]] = reply.json()["data"]
    return sum(each == thread for each, _ in asked), found


def test_a_list_of_fifty_jobs_takes_the_statements_of_a_list_of_two(idle: Any) -> None:
    for number in range(54):
        make_job(idle, number, begun=number % 3, ends=number % 3 == 2)
        if number % 2:
            made = idle.state.jobs.get("local", f"job_{number:024d}")
            with idle.state.store.write() as connection:
                promise(connection, made)
    with idle.http() as client:
        few, two = statements(idle, client, "/v1/jobs?limit=2", "jobs.created_at DESC")
        many, fifty = statements(idle, client, "/v1/jobs?limit=50", "jobs.created_at DESC")
        alone = [client.get(f"/v1/jobs/{shown['id']}").json() for shown in fifty]
    assert (len(two), len(fifty)) == (2, 50)
    assert few == many
    assert [timeless(shown) for shown in fifty] == [timeless(shown) for shown in alone]
    done = {shown["id"]: (shown["rows"]["done"], shown["usage"]["completion_tokens"]) for shown in fifty}
    assert {done[f"job_{n:024d}"] for n in range(6, 54, 3)} == {(0, 0)}
    assert {done[f"job_{n:024d}"] for n in range(7, 54, 3)} == {(4, 12)}
    assert {done[f"job_{n:024d}"] for n in range(8, 54, 3)} == {(20, 24)}


def timeless(shown: dict[str, Any]) -> dict[str, Any]:
    return {**shown, "eta_seconds": shown["eta_seconds"] is None}


def test_so_does_a_list_of_batches(idle: Any) -> None:
    request = '{"endpoint": "/v1/completions", "input_file_id": "f", "completion_window": "24h", "metadata": null}'
    for number in range(51):
        make_job(idle, number, kind="batch", request=request)
    with idle.http() as client:
        few, two = statements(idle, client, "/v1/batches?limit=2", "jobs.created_at DESC")
        many, fifty = statements(idle, client, "/v1/batches?limit=50", "jobs.created_at DESC")
    assert (len(two), len(fifty)) == (2, 50)
    assert few == many


def test_jobs_are_listed_by_status_model_tag_and_time(idle: Any) -> None:
    running = make_job(idle, 0, begun=1, query_tag="nightly")
    waiting = make_job(idle, 60, model="other", query_tag="nightly")
    stopped = make_job(idle, 7200)
    idle.state.jobs.stop(idle.state.jobs.get("local", stopped), "cancelled")
    client = Client(idle.url)

    def ids(**which: Any) -> list[str]:
        return [found["id"] for found in client.jobs(**which)]

    assert ids() == [stopped, waiting, running]
    assert ids(status="running") == [running]
    assert ids(status=["queued", "cancelled"]) == [stopped, waiting]
    assert ids(model="other") == [waiting]
    assert ids(model="nothing") == []
    assert ids(query_tag="nightly", status="running") == [running]
    at = datetime.fromtimestamp(BEGAN + 60, UTC)
    assert ids(created_after=at) == [stopped, waiting]
    assert ids(created_before=at) == [running]
    assert ids(created_after=at, created_before=at.replace(tzinfo=None, year=2027)) == [stopped, waiting]
    with idle.http() as http:
        by_number = http.get("/v1/jobs", params={"created_after": BEGAN + 60, "limit": 1}).json()
        assert ([found["id"] for found in by_number["data"]], by_number["has_more"]) == ([stopped], True)
        rest = http.get("/v1/jobs", params={"created_after": BEGAN + 60, "after": stopped}).json()
        assert [found["id"] for found in rest["data"]] == [waiting]
        wrong = http.get("/v1/jobs", params={"status": "over"})
        assert (wrong.status_code, "'queued', 'running'" in wrong.json()["error"]["message"]) == (400, True)
    client.close()


def test_every_status_of_a_job_can_be_asked_for() -> None:
    assert get_args(JobStatus) == tuple(JOB_MOVES)


def test_the_shell_lists_jobs_by_status_and_tag(idle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make_job(idle, 0, begun=1, query_tag="nightly")
    make_job(idle, 1, query_tag="nightly")
    make_job(idle, 2)
    for given, shown in (
        (["--status", "queued", "--status", "running"], "012"),
        (["--status", "queued", "--query-tag", "nightly"], "1"),
        (["--model", "echo", "--limit", "1"], "2"),
    ):
        assert main(["jobs", "list", "--url", idle.url, *given]) == 0
        ids = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
        assert sorted(name[-1] for name in ids) == list(shown)


def test_files_are_listed_by_time_and_in_either_order(idle: Any) -> None:
    for number in range(3):
        with idle.state.uploads.writing("local", f"{number}.csv", "user_data", f"file-{number}") as (sink, _):
            sink.write(b"a\n1\n")
    middle = idle.state.uploads.get("local", "file-1").created_at
    with idle.http() as http:

        def names(**which: Any) -> list[str]:
            return [found["filename"][0] for found in http.get("/v1/files", params=which).json()["data"]]

        assert names() == ["2", "1", "0"]
        assert names(order="asc") == ["0", "1", "2"]
        assert names(order="asc", after="file-0") == ["1", "2"]
        assert names(created_before=datetime.fromtimestamp(middle - 1, UTC).isoformat()) == []
        assert len(names(created_after=datetime.fromtimestamp(middle - 60, UTC).isoformat())) == 3
