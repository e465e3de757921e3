"""`complete-fn run` and jobs read rows from a DuckDB file and write answers to one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from complete_fn.errors import DatabaseAwayError, InputError
from complete_fn.rows.databases import Query
from complete_fn.rows.identifiers import quote_name, quote_table
from complete_fn.rows.readers import BATCH_ROWS
from complete_fn.rows.result_tables import refuse_keys, refuse_name
from complete_fn.rows.watchdog import QueryLimit
from complete_fn_connectors.duckdb_query.json_versions import read_batches

AWAY = ("lock on file", "No space", "could not write")  # another process has the file, or its disk is full
MEMORY_LIMIT = "1GiB"  # memory of a tenant's query; DuckDB's own default is 80 % of the machine's memory


def open_database(url: str, read_only: bool, seconds: float | None) -> DuckDatabase:
    """Args: url: duckdb:///relative.duckdb or duckdb:////absolute.duckdb."""
    path = url.partition("://")[2].removeprefix("/")
    if not path:
        raise InputError("A DuckDB URL names a file: duckdb:///relative.duckdb or duckdb:////absolute.duckdb.")
    return DuckDatabase(path, read_only, seconds)


class DuckDatabase:
    """A `rows.databases.RowDatabase`. A tenant's SQL runs without access to files, network, extensions or settings."""

    def __init__(self, path: str, read_only: bool, seconds: float | None) -> None:
        self.path, self.read_only, self.seconds = path, read_only, seconds

    @contextmanager
    def connected(self, reading: bool) -> Iterator[Any]:
        settings: dict[str, Any] = {}
        if self.read_only:
            settings = {"enable_external_access": "false", "lock_configuration": "true", "memory_limit": MEMORY_LIMIT}
        limit = QueryLimit(self.seconds)
        try:
            with (
                duckdb.connect(self.path, read_only=reading, config=settings) as connection,
                limit.enforced(connection.interrupt),
            ):
                yield connection
        except duckdb.Error as error:
            text = str(error).splitlines()[0]
            if isinstance(error, duckdb.IOException) and any(mark in text for mark in AWAY):
                raise DatabaseAwayError(f"The DuckDB file cannot be used now: {text}") from error
            raise InputError(f"DuckDB refuses: {text}") from error

    def batches(self, query: Query) -> Iterator[Any]:
        sql, values = query.sql, []
        if query.key is not None:
            name = quote_name(query.key)
            behind = "" if query.after is None else f"WHERE {name} {'=' if query.at else '>'} ? "
            values = [] if query.after is None else [query.after]
            sql = f"SELECT * FROM ({sql}\n) AS q {behind}ORDER BY {name}"
        with self.connected(self.read_only) as connection:
            statements = connection.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise InputError("The SQL must be one SELECT.")
            reader = read_batches(connection.execute(sql, values), BATCH_ROWS)
            yield pa.RecordBatch.from_pylist([], reader.schema)
            yield from reader

    def quoted(self, table: str) -> str:
        return quote_table(table)

    def has(self, table: str, key: str, value: Any) -> bool:
        target = self.quoted(table)
        try:
            with self.connected(False) as connection:
                one = connection.execute(
                    f"SELECT 1 FROM {target} WHERE {quote_name(key)} = ? LIMIT 1", [value]
                ).fetchone()
                return one is not None
        except InputError:
            return False  # there is no such table

    longest_key = None

    def upsert(self, table: str, key: str, rows: Any) -> None:
        self.put(table, key, rows, is_rehearsal=False)

    def rehearse(self, table: str, key: str, rows: Any) -> None:
        self.put(table, key, rows, is_rehearsal=True)

    def put(self, table: str, key: str, rows: Any, is_rehearsal: bool) -> None:
        refuse_keys(rows.column(key), key)
        refuse_name(table)
        with self.connected(False) as connection:
            target = self.quoted(table)
            others = ", ".join(f"{quote_name(n)} = excluded.{quote_name(n)}" for n in rows.column_names if n != key)
            columns = ", ".join(quote_name(n) for n in rows.column_names)
            connection.begin()
            connection.register("new_answers", rows)
            types = connection.execute("DESCRIBE SELECT * FROM new_answers").fetchall()
            made = ", ".join(f"{quote_name(n)} {kind}{' PRIMARY KEY' if n == key else ''}" for n, kind, *_ in types)
            connection.execute(f"CREATE TABLE IF NOT EXISTS {target} ({made})")
            there = {name for name, *_ in connection.execute(f"DESCRIBE {target}").fetchall()}
            if missing := [n for n in rows.column_names if n not in there]:
                raise InputError(f"The table {table!r} is there and has no column {missing[0]!r}. Name another one.")
            connection.execute(
                f"INSERT INTO {target} ({columns}) SELECT {columns} FROM new_answers "
                f"ON CONFLICT ({quote_name(key)}) DO UPDATE SET {others}"
            )
            if is_rehearsal:
                connection.rollback()
            else:
                connection.commit()

    def powers(self) -> list[str]:
        return []  # a tenant's SELECT has no files, no network and no settings

    def close(self) -> None:
        pass
