"""Rows a second out of PostgreSQL: by ADBC, as `run` and jobs read it, and by psycopg through Python's objects.

Alternating runs over the same table, in a database that is made for it and dropped.
"""

from __future__ import annotations

import argparse
import platform
import secrets
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import psycopg
from psycopg.conninfo import make_conninfo

from complete_fn.rows import databases
from complete_fn.rows.databases import Query, SqlDatabase, open_database

URL = "postgresql://postgres@127.0.0.1"

COLUMNS = {
    "text": "SELECT i AS id, repeat(md5(i::text), 6) AS text FROM generate_series(1, {rows}) i",
    "seven kinds": "SELECT i AS id, i::int AS n, repeat(md5(i::text), 6) AS text, i / 7.0::float8 AS x, now() AS at, "
    "i % 2 = 0 AS b, date '2020-01-01' + i % 100 AS d FROM generate_series(1, {rows}) i",
}


@contextmanager
def new_database(server: str) -> Iterator[str]:
    """Name of a new database; `server` is a conninfo of a user who may make one."""
    name = f"complete_fn_{secrets.token_hex(4)}"
    with psycopg.connect(make_conninfo(server, dbname="postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
        try:
            yield name
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@contextmanager
def docs(server: str, sql: str) -> Iterator[str]:
    """URL of a new database with a table `docs` of what the SELECT gives, indexed by its `id`."""
    with new_database(server) as name:
        with psycopg.connect(f"{server}/{name}", autocommit=True) as connection:
            connection.execute(f"CREATE TABLE docs AS {sql}".encode())
            connection.execute("CREATE INDEX ON docs (id)")
        yield f"{server}/{name}"


def seconds(database: SqlDatabase, rows: int, arrow: bool) -> float:
    kept = databases.open_query
    if not arrow:
        databases.open_query = lambda *_: None  # type: ignore[assignment]
    began = time.perf_counter()
    found = sum(batch.num_rows for batch in database.batches(Query("SELECT * FROM docs", "id")))
    databases.open_query = kept
    assert found == rows
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--server", default=URL, help="of a user who may make databases")
    a = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("adbc-driver-postgresql", "psycopg", "pyarrow"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}; {a.rows:,} rows, {a.pairs} pairs")
    for name, sql in COLUMNS.items():
        with docs(a.server, sql.format(rows=a.rows)) as url:
            database = open_database(url)
            assert isinstance(database, SqlDatabase)
            pairs = [(seconds(database, a.rows, True), seconds(database, a.rows, False)) for _ in range(a.pairs)]
            arrow, objects = (a.rows / statistics.median(times) for times in zip(*pairs, strict=True))
            ratios = sorted(slow / fast for fast, slow in pairs)
            print(
                f"{name:<12} ADBC {arrow:>11,.0f} rows/s, psycopg {objects:>9,.0f} rows/s: "
                f"{statistics.median(ratios):.1f}x [{ratios[0]:.1f}-{ratios[-1]:.1f}]"
            )


if __name__ == "__main__":
    main()
