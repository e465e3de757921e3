"""complete_submit and its like in DuckDB: submitted from SQL, come back to from another connection."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest

from complete_fn.client import Client
from complete_fn_connectors.duckdb.job_functions import progress, register_jobs
from tests.integration.server.call_outs.test_server_dialects import Counting
from tests.integration.server.conftest import Running


def connected(running: Running, key: str | None = None) -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    register_jobs(con, Client(running.url, key))
    return con


def one(con: duckdb.DuckDBPyConnection, query: str, *values: Any) -> Any:
    row = con.execute(query, values).fetchone()
    assert row is not None
    return row[0]


def finished(con: duckdb.DuckDBPyConnection, job: str) -> Any:
    until = time.monotonic() + 60
    while True:
        found = one(con, "SELECT complete_progress(?)", job)
        if found["status"] not in ("queued", "running", "stopping") or time.monotonic() > until:
            return found
        time.sleep(0.1)


def test_a_query_is_submitted_and_its_result_read_elsewhere(serve: Callable[..., Running]) -> None:
    engine = Counting()
    running = serve(engine=engine)
    with connected(running) as con:
        con.execute("CREATE TABLE docs AS SELECT i AS id, 'row ' || i AS body FROM range(5) t(i)")
        options = json.dumps({"max_tokens": 2})
        job = one(con, "SELECT complete_submit('SELECT * FROM docs ORDER BY id', 'echo', 'say {body}', ?)", options)
    with connected(running) as later:
        found = finished(later, job)
        assert (found["status"], found["rows"], found["done"], found["failed"]) == ("completed", 5, 5, 0)
        assert found["cost"] > 0
        rows = later.execute("SELECT \"row\" ->> 'id', completion FROM complete_result(?)", [job]).fetchall()
        assert rows == [(str(n), "say row") for n in range(5)]
    assert len(engine.asked) == 5


def test_a_job_is_cancelled_and_strangers_do_not_see_it(serve: Callable[..., Running]) -> None:
    gate = threading.Event()
    running = serve(engine=Counting(gate))
    ann, bob = (running.state.keys.create(tenant, "x") for tenant in ("a", "b"))
    with connected(running, ann) as con, connected(running, bob) as other:
        job = one(con, "SELECT complete_submit('SELECT 1 AS id', 'echo', 'row {id}')")
        assert con.execute("SELECT * FROM complete_result(?)", [job]).fetchall() == []
        with pytest.raises(duckdb.Error, match=job):
            other.execute("SELECT * FROM complete_result(?)", [job])
        assert one(con, "SELECT complete_cancel(?)", job) in ("stopping", "cancelled")
        assert finished(con, job)["status"] == "cancelled"
    gate.set()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT complete_submit('SELECT 1 AS id', 'echo', 'no column {x}')", "x"),
        ("SELECT complete_submit('SELECT 1 AS id', 'nope', 'row {id}')", "'nope'"),
        ("SELECT complete_submit('DROP TABLE docs', 'echo', 'row {id}')", "one SELECT"),
        ("SELECT complete_submit('SELECT 1 AS id', 'echo')", "complete_submit"),
        ("SELECT complete_submit('SELECT 1 AS id', 'echo', '{id}', '[1]')", "no JSON object"),
        ("SELECT * FROM complete_result('never')", "never"),
    ],
)
def test_faults_name_the_value(shared: Running, query: str, message: str) -> None:
    with connected(shared) as con, pytest.raises(duckdb.Error, match=message):
        con.execute(query).fetchall()


def test_progress_tells_the_seconds_that_the_service_expects(serve: Callable[..., Running]) -> None:
    running = serve(engine=Counting())
    with connected(running) as con:
        con.execute("CREATE TABLE docs AS SELECT 'row ' || i AS body FROM range(3) t(i)")
        job = one(con, "SELECT complete_submit('FROM docs', 'echo', 'say {body}')")
        assert finished(con, job)["seconds_left"] is None  # of a job that is over
    expected = {**Client(running.url).job(job).state(), "eta_seconds": 12.5}
    client = SimpleNamespace(job=lambda _: SimpleNamespace(state=lambda: expected))
    assert progress(client, job)["seconds_left"] == 12.5  # type: ignore[arg-type]
