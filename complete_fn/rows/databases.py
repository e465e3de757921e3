"""Databases give rows and take answers: PostgreSQL, MariaDB, MySQL and SQLite here, DuckDB through its connector."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Protocol

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from complete_fn.errors import DatabaseAwayError, InputError
from complete_fn.ports import PORTS, is_port
from complete_fn.registry import DATABASES, resolve
from complete_fn.rows.formats import Rows
from complete_fn.rows.identifiers import quote_name, quote_table
from complete_fn.rows.limits import NO_LIMITS, TableLimits
from complete_fn.rows.postgres_adbc import AdbcQuery, open_query
from complete_fn.rows.readers import BATCH_ROWS, WindowSize, slice_size, table_windows
from complete_fn.rows.result_tables import is_mariadb, refuse_keys, result_table, upserting
from complete_fn.rows.watchdog import QueryLimit

CONNECT_SECONDS = 10
VALUE_BYTES = 64 * 1024 * 1024  # of one value of a stranger's query in SQLite
STRANGER_ROWS, FETCH_BYTES = 16, 16 * 1024 * 1024  # a stranger's query: rows of the first fetch, bytes of later ones
LOCK_SECONDS = 30  # longest wait of a write for other sessions' locks, because the writer has other work to do
DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
    "sqlite": "sqlite",
}
THE_QUERY = "The query"  # in messages; its text may hold what is nobody's business
SCHEMES = (*DRIVERS, *DATABASES)
# PostgreSQL's functions that reach files, other databases or the server's settings even in a read-only transaction.
REACHING_OUT = (
    *("dblink", "dblink_connect", "dblink_exec", "pg_read_file", "pg_read_binary_file", "pg_ls_dir"),
    *("lo_import", "lo_export", "pg_reload_conf"),
)
POWERS = """
SELECT current_setting('is_superuser') = 'on',
       (SELECT array_agg(DISTINCT proname::text ORDER BY proname::text) FROM pg_proc
        WHERE proname = ANY(:names) AND has_function_privilege(oid, 'EXECUTE'))"""
# In this order: the connection broke, no memory or disk or connection left, the server stops or starts, a lock that
# others hold (deadlock, serialization, lock timeout).
POSTGRES_AWAY = ("08", "53", "57P", "40001", "40P01", "55P03")
# Full disk, too many connections, locks (wait, deadlock), the server stops, is not there, or has gone.
MYSQL_AWAY = (1021, 1040, 1053, 1205, 1213, 2002, 2003, 2006, 2013)
SQLITE_AWAY = ("locked", "unable to open", "full", "disk I/O")
# The type of a column of NULLs, by the driver's type code: PostgreSQL's oids, MySQL's codes on the wire.
KINDS: dict[str, dict[int, Any]] = {
    "postgresql": {
        16: pa.bool_(), 17: pa.binary(), 20: pa.int64(), 21: pa.int64(), 23: pa.int64(), 700: pa.float64(),
        701: pa.float64(), 1082: pa.date32(), 1114: pa.timestamp("us"), 1184: pa.timestamp("us", "UTC"),
    },
    "mysql": {
        1: pa.int64(), 2: pa.int64(), 3: pa.int64(), 4: pa.float64(), 5: pa.float64(), 7: pa.timestamp("us"),
        8: pa.int64(), 9: pa.int64(), 10: pa.date32(), 12: pa.timestamp("us"),
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Query:
    """One SELECT.

    Attributes:
        key: the column that orders the rows; None for the query's own order.
        after: only rows whose key is greater than this value; None for all rows.
        at: only rows whose key equals `after`, instead.
    """

    sql: str
    key: str | None = None
    after: Any = None
    at: bool = False


class RowReader(Protocol):
    """What gives the rows of queries."""

    def batches(self, query: Query) -> Iterator[Any]:
        """Record batches of one schema, streamed; at least one, which may be empty.

        Raises:
            InputError: The database refuses the query.
        """
        ...


class RowDatabase(RowReader, Protocol):
    """A database that gives rows and takes answers.

    Attributes:
        longest_key: the most characters of a key that is text; None for any number.
    """

    longest_key: int | None

    def quoted(self, table: str) -> str:
        """The table's name as this database's SQL has it."""
        ...

    def has(self, table: str, key: str, value: Any) -> bool:
        """Whether the table exists and has a row with this value of the key."""
        ...

    def upsert(self, table: str, key: str, rows: Any) -> None:
        """Write rows (an Arrow table) in one transaction. A row replaces the one with its key; a missing table is made.

        Raises:
            InputError: The table exists and is no result table, or a key is NULL or comes twice.
            DatabaseAwayError: The database does not answer, or has no space or lock to give now.
        """
        ...

    def rehearse(self, table: str, key: str, rows: Any) -> None:
        """Do all that `upsert` does, and take it back. A database that cannot take back a new table keeps it, empty.

        Raises:
            InputError, DatabaseAwayError: See `upsert`.
        """
        ...

    def powers(self) -> list[str]:
        """What a stranger's SELECT could do besides reading tables, in words for the operator: "is a superuser"."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class QuerySource:
    """The rows of a query, as windows of the size `window`; None for the usual one."""

    database: RowReader
    query: Query
    limits: TableLimits = NO_LIMITS
    window: WindowSize | None = None

    def windows(self) -> Iterator[Rows]:
        count = 0
        batches = self.database.batches(self.query)
        first = next(batches)
        self.limits.refuse_columns(len(first.schema), THE_QUERY)
        for rows in table_windows(first.schema, self.bounded(itertools.chain([first], batches)), self.window):
            count += rows.count
            self.limits.refuse_rows(count, THE_QUERY)
            yield rows

    def bounded(self, batches: Iterator[Any]) -> Iterator[Any]:
        size = 0
        for batch in batches:
            size += slice_size(batch, batch)
            self.limits.refuse_bytes(size, THE_QUERY)
            yield batch

    def behind(self, after: Any) -> QuerySource:
        """The source with only the rows behind the row of this key.

        Raises:
            InputError: Several rows have this key, by the database's own comparison.
        """
        there = self.database.batches(replace(self.query, after=after, at=True))
        if sum(batch.num_rows for batch in there) > 1:
            raise InputError(f"The key {self.query.key!r} has the value {after!r} more than once.")
        return replace(self, query=replace(self.query, after=after))


def open_database(url: str, *, read_only: bool = False, seconds: float | None = None) -> RowDatabase:
    """Args:
        read_only: for one SELECT of a stranger: the session cannot write, and the query may take `seconds` at most.

    Raises:
        InputError: The URL names no supported database. The message omits the URL, which may contain a password.
        EngineMissingError: The database's library is not installed.
    """
    scheme = url.partition(":")[0].partition("+")[0]
    if scheme in DATABASES:
        found: RowDatabase = resolve(DATABASES[scheme])(url, read_only, seconds)
        return found
    if scheme not in DRIVERS:
        raise InputError(f"{scheme!r} is no database that is taken. Take one of {', '.join(SCHEMES)}.")
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError) as error:
        raise InputError("The database's URL cannot be read; it is like postgresql://user@host/name.") from error
    if not is_port(parsed.port):
        raise InputError(f"The database's URL names the port {parsed.port}; {PORTS}.")
    return SqlDatabase(parsed, read_only, seconds)


class SqlDatabase:
    """A database that is reached through SQLAlchemy."""

    def __init__(self, url: sa.URL, read_only: bool, seconds: float | None) -> None:
        self.kind = url.get_backend_name()
        self.family = "mysql" if self.kind == "mariadb" else self.kind
        self.read_only, self.seconds = read_only, seconds
        self.longest_key = 255 if self.family == "mysql" else None
        name = url.drivername if "+" in url.drivername else DRIVERS[self.kind]
        self.where = f"{self.kind} database {url.database!r}"
        with self.named_errors():
            self.engine = sa.create_engine(
                url.set(drivername=name), poolclass=sa.NullPool, connect_args=self.connect_arguments()
            )

    def connect_arguments(self) -> dict[str, Any]:
        if self.family == "postgresql":
            return {"connect_timeout": CONNECT_SECONDS}
        if self.family == "mysql":
            limits = {} if self.seconds is None else dict.fromkeys(("read_timeout", "write_timeout"), self.seconds + 10)
            return {"connect_timeout": CONNECT_SECONDS, "charset": "utf8mb4", "local_infile": False, **limits}
        return {"timeout": LOCK_SECONDS}

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Raise a database's error as InputError, in the database's words. URL, statement and values are left out."""
        try:
            yield
        except DBAPIError as error:
            text = str(error.orig).strip().splitlines() or [type(error.orig).__name__]
            if is_away(error):
                raise DatabaseAwayError(f"The {self.where} cannot be used now: {text[0]}") from error
            raise InputError(f"The {self.where} refuses: {text[0]}") from error
        except SQLAlchemyError as error:
            raise InputError(f"The {self.where} cannot be used: {str(error).splitlines()[0]}") from error

    def batches(self, query: Query) -> Iterator[Any]:
        limit = QueryLimit(self.seconds)
        if self.family == "postgresql" and (arrow := self.arrow_batches(query)) is not None:
            with closing(arrow), limit.enforced(arrow.cancel):
                for batch in arrow.batches():
                    if batch.num_rows:
                        limit.refuse_late()
                    yield batch
            return
        is_sqlite = self.family == "sqlite"
        sql = self.statement(query, "?" if is_sqlite else "%s", doubled=not is_sqlite)
        values = None if query.after is None else (query.after,)
        with (
            self.named_errors(),
            self.engine.connect() as connection,
            limit.enforced(self.canceller(connection)),
        ):
            if self.read_only:
                self.make_read_only(connection)
            streaming = connection.execution_options(stream_results=True, max_row_buffer=BATCH_ROWS)
            result = streaming.exec_driver_sql(sql, values)
            names = list(result.keys())
            codes = [column[1] for column in result.cursor.description] if result.cursor is not None else []
            kinds: list[Any] | None = None
            for found in fetched(result, self.read_only):
                limit.refuse_late()
                columns = [[plain(v) for v in column] for column in zip(*found, strict=True)]
                kinds = kinds or [self.kind_of(v, c) for v, c in zip(columns, codes, strict=True)]
                yield batch_of(names, columns, kinds)
            if kinds is None:
                nothing: list[list[Any]] = [[] for _ in names]
                yield batch_of(names, nothing, [self.kind_of([], c) for c in codes])

    def arrow_batches(self, query: Query) -> AdbcQuery | None:
        """The query by ADBC; None if it is not installed or would read a column differently."""
        if self.engine.dialect.driver != "psycopg":
            return None
        from psycopg.conninfo import make_conninfo
        from psycopg.sql import Literal

        # A literal: with parameters, the driver would hold the statement's whole result in memory.
        sql = self.statement(query, "" if query.after is None else Literal(query.after).as_string(None))
        given = dict(self.engine.dialect.create_connect_args(self.engine.url)[1])
        given.pop("context", None)  # an argument of psycopg that libpq does not know
        conninfo = make_conninfo(**{"connect_timeout": CONNECT_SECONDS} | given | {"client_encoding": "utf8"})
        return open_query(conninfo, sql, self.read_only_statements(), self.where)

    def statement(self, query: Query, after: str, doubled: bool = False) -> str:
        """The SQL of the query.

        Args:
            after: The SQL text of the value `query.after`: a placeholder or a literal.
            doubled: Write each % twice, for a driver that substitutes %s in every statement.
        """
        sql, name = query.sql, quote_name(query.key or "", self.family)
        if doubled:
            sql, name = sql.replace("%", "%%"), name.replace("%", "%%")
        if query.key is None:
            return sql
        where = "" if query.after is None else f"WHERE {name} {'=' if query.at else '>'} {after} "
        return f"SELECT * FROM ({sql}\n) AS q {where}ORDER BY {name}"

    def quoted(self, table: str) -> str:
        return quote_table(table, self.family)

    def read_only_statements(self) -> list[str]:
        """The statements that begin a read-only transaction in PostgreSQL."""
        limit = f"SET LOCAL statement_timeout = {int((self.seconds or 0.0) * 1000)}"
        return ["SET TRANSACTION READ ONLY", limit] if self.read_only else []

    def canceller(self, connection: sa.Connection) -> Callable[[], None]:
        """Ends what the connection's session runs. It is called on another thread."""
        inner: Any = connection.connection.driver_connection
        if self.family == "postgresql":
            return lambda: inner.cancel_safe(timeout=CONNECT_SECONDS)
        if self.family == "mysql":
            return lambda: self.kill_query(inner.thread_id())
        return lambda: inner.interrupt()

    def kill_query(self, session: int) -> None:
        with self.engine.connect() as connection:
            connection.exec_driver_sql(f"KILL QUERY {session}")

    def make_read_only(self, connection: sa.Connection) -> None:
        seconds = self.seconds or 0.0
        if self.family == "postgresql":
            for statement in self.read_only_statements():
                connection.exec_driver_sql(statement)
        elif self.family == "mysql":
            own = f"max_statement_time = {seconds}" if is_mariadb(connection.dialect) else ""
            own = own or f"max_execution_time = {int(seconds * 1000)}"
            connection.exec_driver_sql(f"SET SESSION {own}, sql_mode = CONCAT(@@sql_mode, ',NO_BACKSLASH_ESCAPES')")
            connection.exec_driver_sql("SET SESSION TRANSACTION READ ONLY")
            connection.commit()
        else:
            connection.exec_driver_sql("PRAGMA query_only = ON")
            inner: Any = connection.connection.driver_connection
            # One call of a function, hex(zeroblob(..)) say, cannot be interrupted: its result is kept small instead.
            inner.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_BYTES)

    def powers(self) -> list[str]:
        """What else than reading tables a stranger's SELECT could do with this role, for an operator's eyes."""
        if self.family != "postgresql":
            return []
        with self.named_errors(), self.engine.connect() as connection:
            is_superuser, functions = connection.execute(sa.text(POWERS), {"names": list(REACHING_OUT)}).one()
        return [*(["is a superuser"] if is_superuser else []), *(f"may call {name}()" for name in functions or ())]

    def limit_waiting(self, connection: sa.Connection) -> None:
        """Limit how long a transaction that writes waits for locks."""
        if self.family == "postgresql":
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
            if self.seconds is not None:
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {int(self.seconds * 1000)}")
        elif self.family == "mysql":
            limits = f"innodb_lock_wait_timeout = {LOCK_SECONDS}, lock_wait_timeout = {LOCK_SECONDS}"
            connection.exec_driver_sql(f"SET SESSION {limits}")

    def kind_of(self, values: Sequence[Any], code: Any) -> Any:
        """The Arrow type of a column, from its first values; if all are NULL, from the driver's type code."""
        if all(v is None for v in values):
            return KINDS.get(self.family, {}).get(code, pa.large_string())
        if any(isinstance(v, Decimal) for v in values):
            scale = max(max(0, -int(v.as_tuple().exponent)) for v in values if isinstance(v, Decimal) and v.is_finite())
            return pa.decimal128(38, scale)
        try:
            found = pa.array(values).type
        except (pa.ArrowException, OverflowError):
            return pa.large_string()
        return pa.large_string() if pa.types.is_string(found) else found

    def has(self, table: str, key: str, value: Any) -> bool:
        schema, _, name = table.rpartition(".")
        found = sa.table(name, sa.column(key), schema=schema or None)
        with self.named_errors(), self.engine.connect() as connection:
            if not sa.inspect(connection).has_table(name, schema or None):
                return False
            one = sa.select(sa.literal(1)).select_from(found).where(found.c[key] == value).limit(1)
            return connection.execute(one).first() is not None

    def upsert(self, table: str, key: str, rows: Any) -> None:
        with self.named_errors(), self.engine.begin() as connection:
            self.put(connection, result_table(self.prepared(connection), table, key, rows.schema), key, rows)

    def rehearse(self, table: str, key: str, rows: Any) -> None:
        with self.named_errors(), self.engine.connect() as connection, connection.begin() as transaction:
            made = result_table(self.prepared(connection), table, key, rows.schema)
            if has_rollback(connection, made):
                self.put(connection, made, key, rows)
            transaction.rollback()

    def prepared(self, connection: sa.Connection) -> sa.Connection:
        if self.family == "sqlite":  # its driver begins no transaction before a CREATE TABLE
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        self.limit_waiting(connection)
        return connection

    def put(self, connection: sa.Connection, table: sa.Table, key: str, rows: Any) -> None:
        refuse_keys(rows.column(key), key, self.longest_key)
        statement = upserting(table, key, connection.dialect.name)
        for batch in rows.to_batches(BATCH_ROWS):
            if batch.num_rows:
                connection.execute(statement, batch.to_pylist())

    def close(self) -> None:
        self.engine.dispose()


def has_rollback(connection: sa.Connection, table: sa.Table) -> bool:
    """Whether rows that are written to the table can be taken back. Some engines of MySQL and MariaDB cannot."""
    if connection.dialect.name not in ("mysql", "mariadb"):
        return True
    asked = sa.text(
        "SELECT e.transactions FROM information_schema.tables t JOIN information_schema.engines e ON e.engine = "
        "t.engine WHERE t.table_schema = coalesce(:schema, database()) AND t.table_name = :name"
    )
    return connection.execute(asked, {"schema": table.schema, "name": table.name}).scalar() == "YES"


def is_away(error: DBAPIError) -> bool:
    """Whether the same statement may succeed later: the database is down, full, or holds a lock for somebody else."""
    original: Any = error.orig
    state = getattr(original, "sqlstate", None)
    if isinstance(original, sqlite3.Error):
        return any(mark in str(original) for mark in SQLITE_AWAY)
    if original.args and isinstance(original.args[0], int):
        return original.args[0] in MYSQL_AWAY
    if state is not None:
        return str(state).startswith(POSTGRES_AWAY)
    return error.connection_invalidated or type(original).__name__ == "OperationalError"  # no server gave a state


def fetched(result: Any, is_stranger: bool) -> Iterator[Any]:
    """The result's rows in lists. From a stranger's query, of about so many bytes that they fit into memory."""
    rows = STRANGER_ROWS if is_stranger else BATCH_ROWS
    while found := result.fetchmany(rows):
        yield found
        if is_stranger:
            size = sum(len(value) for row in found for value in row if isinstance(value, str | bytes))
            fitting = FETCH_BYTES * len(found) // max(size, 1)
            rows = max(1, min(2 * rows, fitting, BATCH_ROWS))


def plain(value: Any) -> Any:
    """A driver's value as a value that Arrow knows: nested values become JSON, other unknown types text."""
    if value is None or isinstance(value, str | bool | int | float | Decimal | datetime | date | bytes):
        return value
    if isinstance(value, memoryview | bytearray):
        return bytes(value)
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def batch_of(names: Sequence[str], columns: Sequence[list[Any]], kinds: Sequence[Any]) -> Any:
    """Raises:
    InputError: A value has another type than the values before it in its column.
    """
    arrays = []
    for name, values, kind in zip(names, columns, kinds, strict=True):
        text = pa.types.is_large_string(kind)
        try:
            arrays.append(
                pa.array([v if v is None or isinstance(v, str) else str(v) for v in values] if text else values, kind)
            )
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            raise InputError(
                f"Column {name!r} has values of several types ({kind} first). CAST it in the SQL."
            ) from error
    return pa.record_batch(arrays, list(names))
