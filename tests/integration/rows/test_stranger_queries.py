"""A stranger's query ends at its limits of time, bytes and columns, on every database, whatever the query does."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from complete_fn.errors import InputError, TooLargeError
from complete_fn.jobs.connections import Connections
from complete_fn.rows.databases import Query, QuerySource
from complete_fn.rows.limits import NO_LIMITS, TableLimits
from complete_fn.rows.query_process import MEMORY_BYTES, QueryProcess
from complete_fn.rows.watchdog import QueryLimit
from complete_fn.store.store import Store
from deploy.servers import Postgres
from tests.integration.rows.test_run_databases import mariadb

SECONDS = 1.0
NEVER = {
    "postgresql": "SELECT count(*) FROM generate_series(1, 100000000000) a",
    "mariadb": "SELECT SLEEP(60)",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    "duckdb": "SELECT count(*) FROM range(100000000) a, range(100000000) b WHERE a.range + b.range = 7",
}
OFF = "set_config('statement_timeout', '0', true)"
ATTACKS = [
    *NEVER.items(),
    ("postgresql", f"SELECT {OFF} FROM generate_series(1, 3) UNION ALL SELECT pg_sleep(60)::text"),
    ("postgresql", f"SELECT {OFF} || pg_sleep(60)::text"),
    # numeric: psycopg reads it, not ADBC
    ("postgresql", f"SELECT 1.5::numeric, {OFF} FROM generate_series(1, 20000) UNION ALL SELECT 2, pg_sleep(60)::text"),
    ("postgresql", "SELECT 1.5::numeric AS n, pg_sleep(0.01)::text FROM generate_series(1, 100000)"),
    ("sqlite", "SELECT length(hex(zeroblob(400000000)))"),
    ("sqlite", "SELECT hex(randomblob(60000000))"),
    ("mariadb", "SELECT SLEEP(0.5) FROM seq_1_to_1000"),
]  # fmt: skip


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    kind = request.param
    if kind == "mariadb":
        yield from mariadb()
    elif kind == "postgresql":
        yield request.getfixturevalue("postgres_url")
    else:
        path = tmp_path / "docs.db"
        if kind == "duckdb":
            import duckdb

            duckdb.connect(str(path)).close()
        yield f"{kind}:///{path}"


def read(url: str, sql: str, limits: TableLimits = NO_LIMITS, seconds: float = 60.0) -> int:
    return sum(rows.count for rows in QuerySource(QueryProcess(url, seconds), Query(sql), limits).windows())


@pytest.mark.parametrize(("url", "sql"), ATTACKS, indirect=["url"])
def test_a_query_ends_at_its_time_limit(url: str, sql: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError):
        read(url, f"SELECT * FROM ({sql}\n) AS rows_of_job", seconds=SECONDS)
    assert time.monotonic() - began < 20


WIDE = ", ".join(f"{n} AS c{n}" for n in range(20))
LONG = {
    "postgresql": "SELECT repeat('x', 100000) AS t FROM generate_series(1, 1000)",
    "mariadb": "SELECT REPEAT('x', 100000) AS t FROM seq_1_to_1000",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1000) "
    "SELECT hex(zeroblob(50000)) AS t FROM n",
    "duckdb": "SELECT repeat('x', 100000) AS t FROM range(1000)",
}


@pytest.mark.parametrize(("url", "sql"), LONG.items(), indirect=["url"])
def test_rows_of_too_many_bytes_are_refused(url: str, sql: str) -> None:
    assert read(url, sql) == 1000
    with pytest.raises(TooLargeError, match="The query decodes to more than the 10,000,000 bytes"):
        read(url, sql, TableLimits(bytes=10_000_000))


@pytest.mark.parametrize("url", NEVER, indirect=True)
def test_rows_of_too_many_columns_are_refused(url: str) -> None:
    assert read(url, f"SELECT {WIDE}", TableLimits(columns=20)) == 1
    with pytest.raises(TooLargeError, match="The query has more columns than the 19 "):
        read(url, f"SELECT {WIDE}", TableLimits(columns=19))


HUGE = [
    ("duckdb", "SELECT repeat('x', 1000000000) AS a, repeat('y', 2000000000) AS b"),
    ("duckdb", "SELECT repeat('x', 100000000) AS a FROM range(30)"),
    ("postgresql", "SELECT repeat('x', 1000000000) AS a, repeat('y', 1000000000) AS b"),
    pytest.param(
        *("postgresql", "SELECT 1.5::numeric AS n, repeat('x', 1000000000) AS a, repeat('y', 1000000000) AS b"),
        marks=pytest.mark.long,
    ),
    ("sqlite", "SELECT hex(zeroblob(30000000)) AS a, hex(zeroblob(30000000)) AS b"),
]


@pytest.mark.parametrize(("url", "sql"), HUGE, indirect=["url"])
def test_a_row_of_gigabytes_takes_the_memory_of_the_child_only(url: str, sql: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError):
        read(url, sql)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < MEMORY_BYTES // 1024 + 1_000_000


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("sql", ["n", "n, 1.5::numeric AS x"])  # by ADBC; by psycopg
def test_a_long_query_within_its_limit_is_read_whole(url: str, sql: str) -> None:
    assert read(url, f"SELECT repeat('x', n % 3000) AS t, {sql} FROM generate_series(1, 50000) n") == 50_000


def test_a_reader_that_stops_early_leaves_no_process(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'docs.db'}"
    batches = iter(QueryProcess(url, 60.0).batches(Query(NEVER["sqlite"].replace("count(*)", "i"))))
    next(batches)
    started = children()
    assert started
    batches.close()  # type: ignore[attr-defined]
    assert not children() & started


@pytest.mark.parametrize("url", ["sqlite", "duckdb", "postgresql"], indirect=True)
def test_a_query_ends_when_its_reader_is_gone(url: str) -> None:
    """As after a kill -9 of the reader: the system then ends the child's stdin."""
    kind = url.partition(":")[0]
    task = {"url": url, "seconds": 600.0, "query": {"sql": NEVER[kind]}}
    command = [sys.executable, "-P", "-m", "complete_fn.rows.query_process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write(json.dumps(task).encode() + b"\n")
        child.stdin.flush()
        time.sleep(2.0)
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(60) == 1


def children() -> set[int]:
    """Processes that this one has started for queries."""
    listed = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split()
    return {int(pid) for pid in listed if b"query_process" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def test_a_cancellation_that_fails_is_tried_again_until_the_block_ends() -> None:
    tries: list[float] = []

    def cancel() -> None:
        tries.append(time.monotonic())
        raise OSError("the database is away")

    with QueryLimit(0.05).enforced(cancel):
        end = time.monotonic() + 20
        while len(tries) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    count = len(tries)
    assert count >= 2
    time.sleep(1.2)
    assert len(tries) <= count + 1


@pytest.mark.parametrize("is_superuser", [True, False])
def test_a_role_that_may_do_more_than_read_is_named_once(
    postgres: Postgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_superuser: bool,
) -> None:
    import psycopg

    with postgres.database() as own:
        url = own
        if not is_superuser:
            with psycopg.connect(own, autocommit=True) as server:
                server.execute("CREATE ROLE plain_reader LOGIN PASSWORD 'plain'")
            url = sa.make_url(own).set(username="plain_reader", password="plain").render_as_string(False)
        monkeypatch.setenv("DOCS_URL", url)
        known = Connections(Store(tmp_path / "state.sqlite3"))
        known.add("acme", "docs", "DOCS_URL", False)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                known.reader(known.get("acme", "docs"), seconds=5.0)
        if not is_superuser:
            with psycopg.connect(own, autocommit=True) as server:
                server.execute("DROP ROLE plain_reader")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (1 if is_superuser else 0), messages
    assert all("docs of tenant acme: its role is a superuser" in message for message in messages)
