"""`complete-fn run` reads a file, stdin, an object of s3:// or gs://, or a query of a database."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from complete_fn.errors import InputError
from complete_fn.rows.databases import SCHEMES, Query, QuerySource, open_database
from complete_fn.rows.formats import LineRows, Rows, TablePlace, common_schema
from complete_fn.rows.object_storage import remote
from complete_fn.rows.readers import FileSource, Source
from complete_fn.rows.result_tables import refuse_name
from complete_fn.rows.writers import object_of
from complete_fn.settings import secret

CHUNK = 1 << 20


@dataclass(frozen=True)
class Survey:
    """The facts about an input that are known before work is paid for.

    Attributes:
        identity: identifies the input, so that the same command finds the state of an interrupted run.
        first: the input's rows, if they are all in one window.
        count: the number of rows; None if they were not counted.
        names: the names of the columns of all windows.
        schema: the columns of a JSONL that comes in several windows, as `Writer` takes it.
    """

    source: Source
    identity: str
    first: Rows | None
    count: int | None
    names: list[str]
    schema: Any = None


def is_database(name: str) -> bool:
    """Whether the name is a database's URL, or names an environment variable (env:VARIABLE)."""
    return name.startswith("env:") or name.partition(":")[0].partition("+")[0] in SCHEMES


def database_url(name: str) -> str:
    """Raises:
    InputError: The name is env:VARIABLE and the variable is not set.
    """
    if not name.startswith("env:"):
        return name
    url = secret(name.removeprefix("env:"))
    if not url:
        raise InputError(f"{name!r} names an environment variable that is not set.")
    return url


def query_source(name: str, table: str | None, sql: str | None, key: str | None) -> tuple[QuerySource, str]:
    """(source, identity) of a table or a SELECT."""
    if (table is None) == (sql is None):
        raise InputError(f"{name.partition(':')[0]!r} is a database: say --table NAME or --sql 'SELECT ...'.")
    database = open_database(database_url(name))
    if table is not None:
        sql = f"SELECT * FROM {database.quoted(refuse_name(table))}"
    query = Query(str(sql).strip().rstrip(";"), key)
    identity = hashlib.sha256(f"{name}\n{query.sql}\n{key}".encode()).hexdigest()
    return QuerySource(database, query), identity


def file_source(place: TablePlace) -> tuple[FileSource, str]:
    """(source, identity) of a file. Stdin is copied to a temporary file, because a source is read more than once."""
    if place.piped:
        return piped_source(place)
    if remote(place.name):
        storage, name = object_of(place)
        return FileSource(repr(place.name), place.format, lambda: storage.reading(name), place.compression), place.name
    path = Path(place.name)
    opener: Callable[[], Any] = lambda: path.open("rb")  # noqa: E731
    return FileSource(repr(place.name), place.format, opener, place.compression), str(path.resolve())


def piped_source(place: TablePlace) -> tuple[FileSource, str]:
    kept = tempfile.NamedTemporaryFile()  # noqa: SIM115  must live as long as its source
    digest = hashlib.sha256()
    while chunk := sys.stdin.buffer.read(CHUNK):
        digest.update(chunk)
        kept.write(chunk)
    kept.flush()
    return replace(
        file_source(TablePlace(kept.name, place.format, place.compression))[0], name="stdin", kept=kept
    ), digest.hexdigest()


@dataclass(frozen=True)
class Limited:
    """The first rows of a source."""

    source: Source
    rows: int

    def windows(self) -> Any:
        left = self.rows
        for rows in self.source.windows():
            yield rows.limit(left)
            left -= min(left, rows.count)
            if not left:
                return


def survey(source: Source, identity: str, with_schema: bool) -> Survey:
    """Read the whole file once, so that a damaged file is refused before anything is paid for.

    Parquet and databases are not read twice: an incomplete Parquet file has no footer, which is noticed at once.
    """
    windows = source.windows()
    first = next(windows)
    second = next(windows, None)
    if second is None:
        return Survey(source, identity, first, first.count, first.names)
    inner = source.source if isinstance(source, Limited) else source
    found = Survey(source, identity, None, None, first.names)
    if isinstance(inner, QuerySource) or (isinstance(inner, FileSource) and inner.format == "parquet"):
        return found
    count, names, schema = 0, dict.fromkeys(first.names), None
    for rows in joined(first, second, windows):
        count += rows.count
        if isinstance(rows, LineRows):
            names |= dict.fromkeys(rows.names)
            schema = common_schema(schema, rows.schema()) if with_schema else None
    return replace(found, count=count, names=list(names), schema=schema)


def joined(first: Rows, second: Rows, rest: Any) -> Any:
    yield first
    yield second
    yield from rest


def prompt_digest(prompts: Any) -> str:
    """A digest that identifies a column of prompts (large_string)."""
    digest = hashlib.sha256()
    sink = pa.BufferOutputStream()
    column = pa.concat_arrays(prompts.chunks) if prompts.num_chunks else pa.array([], pa.large_string())
    batch = pa.record_batch([column], ["prompt"])
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    digest.update(sink.getvalue())
    return digest.hexdigest()[:16]
