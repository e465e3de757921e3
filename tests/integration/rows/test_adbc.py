"""PostgreSQL read by ADBC gives what the other driver gives, and refuses in the same words."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa

from complete_fn.errors import InputError
from complete_fn.rows import databases
from complete_fn.rows.databases import Query, SqlDatabase, open_database

MAKE = """
CREATE TABLE kinds AS SELECT i AS id, i::smallint AS small, i::bigint * 5000000000 AS big, i % 3 = 0 AS flag,
    i / 7.0::float8 AS real, 'é🦀 100%% \\ ''' || i AS text, 'v'::varchar(9) AS v, 'c'::char(3) AS c, 'n'::name AS name,
    decode(to_hex(i + 4096), 'hex') AS bytes, date '0001-01-01' + i * 20 AS day,
    timestamp '1969-12-31 23:59:59.999999' + i * interval '1 day 1 microsecond' AS at,
    timestamptz '2026-03-29 00:30:00+00' + i * interval '1 hour' AS zoned,
    i::numeric / 8 AS exact, (i / 3.0)::float4 AS rough, jsonb_build_object('i', i) AS json, ARRAY[i] AS list
FROM generate_series(0, 24999) i
"""
HOLES = ", ".join(
    f"nullif({name}, {name}) AS {name}" for name in ("small", "big", "flag", "real", "text", "bytes", "day", "at")
)
FAST = "id, small, big, flag, real, text, v, c, name, bytes, day, at, zoned"


@pytest.fixture(scope="module")
def database(postgres: Any) -> Iterator[SqlDatabase]:
    with postgres.database() as url:
        engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.execute(sa.text(MAKE.replace(":", r"\:")))
            name = connection.exec_driver_sql("SELECT current_database()").scalar()
            connection.exec_driver_sql(f"ALTER DATABASE \"{name}\" SET TimeZone = 'Europe/Berlin'")
        found = open_database(url)
        assert isinstance(found, SqlDatabase)
        yield found
        found.close()


def both(database: SqlDatabase, query: Query, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The table by ADBC, and by the driver."""
    arrow = database.arrow_batches(query)
    assert arrow is not None
    with closing(arrow):
        fast = pa.Table.from_batches(list(arrow.batches()))
    with monkeypatch.context() as patch:
        patch.setattr(databases, "open_query", lambda *_: None)
        return fast, pa.Table.from_batches(list(database.batches(query)))


@pytest.mark.parametrize(
    "query",
    [
        Query(f"SELECT {FAST} FROM kinds ORDER BY id"),
        Query(f"SELECT {FAST} FROM kinds WHERE text LIKE '%100%' -- a comment", "id"),
        Query(f"SELECT {FAST} FROM kinds", "id", 20_000),
        Query(f"SELECT {FAST} FROM kinds WHERE id < 100", "text", "é🦀 100% \\ '5"),
        Query("SELECT id, text, day, at FROM kinds WHERE false"),
        Query(f"SELECT {HOLES} FROM kinds"),
        Query("(VALUES (1, 'a'), (NULL, 'b'))"),
        Query("WITH a AS (SELECT 1 AS one) TABLE a;"),
    ],
)
def test_both_ways_give_the_same_rows_and_types(
    query: Query, database: SqlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = both(database, query, monkeypatch)
    assert fast.schema == slow.schema
    assert fast.equals(slow)


@pytest.mark.parametrize("column", ["exact", "rough", "json", "list"])
def test_types_that_they_read_otherwise_go_the_other_way(column: str, database: SqlDatabase) -> None:
    query = Query(f"SELECT id, {column} FROM kinds WHERE id < 10")
    assert database.arrow_batches(query) is None
    assert sum(batch.num_rows for batch in database.batches(query)) == 10


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM nowhere",
        "SELECT 1; SELECT 2 FROM nowhere",
        "SELECT 1) TO PROGRAM 'touch /tmp/x'; --",
        "SELECT 10 / (id - 24000) AS x FROM kinds",
        "WITH gone AS (DELETE FROM kinds RETURNING id) SELECT id FROM gone",
        "DELETE FROM kinds RETURNING id",
        "SELECT sum(a.id * b.id) FROM kinds a, kinds b",
    ],
)
def test_refusals_are_the_same(sql: str, database: SqlDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = SqlDatabase(database.engine.url, read_only=True, seconds=1.0)
    told = []
    for way in (databases.open_query, lambda *_: None):
        monkeypatch.setattr(databases, "open_query", way)
        with pytest.raises(InputError) as caught:
            list(guarded.batches(Query(sql)))
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert sum(batch.num_rows for batch in database.batches(Query("SELECT id FROM kinds"))) == 25_000


@pytest.mark.parametrize(
    "query",
    [
        Query("SELECT 1 AS a; -- two"),
        Query("SELECT 1 AS a INTO made"),
        Query("SHOW search_path"),
        Query("SELECT (SELECT count(*) FROM kinds WHERE text = ';') AS a"),
    ],
)
def test_statements_that_copy_does_not_take_go_the_other_way(query: Query, database: SqlDatabase) -> None:
    assert database.arrow_batches(query) is None


def test_settings_of_the_url_and_a_time_limit_count(database: SqlDatabase) -> None:
    query = Query("SELECT current_setting('app.tenant') AS tenant, current_setting('work_mem') AS mem")
    options = {"options": "-c app.tenant=odd\\ one -c work_mem=3MB"}
    odd = SqlDatabase(database.engine.url.update_query_dict(options), read_only=False, seconds=None)
    arrow = odd.arrow_batches(query)
    assert arrow is not None
    with closing(arrow):
        assert pa.Table.from_batches(list(arrow.batches())).to_pylist() == [{"tenant": "odd one", "mem": "3MB"}]
    limited = {"options": "-c statement_timeout=60000"}
    slow = SqlDatabase(database.engine.url.update_query_dict(limited), read_only=False, seconds=None)
    assert slow.arrow_batches(Query("SELECT 1 AS a")) is None
    assert sum(batch.num_rows for batch in slow.batches(Query("SELECT 1 AS a"))) == 1


WAITING = """
import sys
from complete_fn.rows.databases import Query, open_database
print("ready", flush=True)
try:
    list(open_database(sys.argv[1]).batches(Query(sys.argv[2])))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(
    "sql", ["SELECT 'x' AS x, pg_sleep(60) IS NULL AS b", "SELECT id, pg_sleep(id - 5) IS NULL AS b FROM kinds"]
)
def test_ctrl_c_ends_a_query_that_waits(sql: str, database: SqlDatabase) -> None:
    url = database.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    command = [sys.executable, "-c", WAITING, url, sql]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(2)
        child.send_signal(signal.SIGINT)
        try:
            out, err = child.communicate(timeout=10)
        finally:
            child.kill()
    assert (out, err) == ("interrupted\n", "")
    with database.engine.connect() as connection:  # nor does the server go on
        busy = (
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%%pg_sleep(%%' AND pid <> %s"
        )
        (own,) = connection.exec_driver_sql("SELECT pg_backend_pid()").one()
        assert connection.exec_driver_sql(busy, (own,)).scalar() == 0


@pytest.mark.parametrize("value", ["infinity", "10000-01-01", "0001-01-01 BC"])
@pytest.mark.parametrize("kind", ["date", "timestamp"])
def test_dates_beyond_the_calendar_are_refused(value: str, kind: str, database: SqlDatabase) -> None:
    with pytest.raises(InputError, match="'x' has dates beyond the years 1 to 9999"):
        list(database.batches(Query(f"SELECT NULL::{kind} AS x UNION ALL SELECT '{value}'")))
