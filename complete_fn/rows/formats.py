"""Tables in files: how a file's name tells its format, and rows that come back as they were. Read in `readers.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import InputError
from complete_fn.registry import Table
from complete_fn.text import text_column

MIXED = pa.large_string()  # the type of a JSONL column whose values have several
EXACT = {b"complete_fn": b"exact"}  # marks integers of a JSONL that are no float64
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


@dataclass(frozen=True)
class Format:
    """A format of table files.

    Attributes:
        suffixes: ends of file names that tell it.
        media_type: for HTTP.
        reader: `module:name`, called as reader(file, source: FileSource) -> Iterator[Rows].
        writer: `module:name`, a `writers.Writer`.
        is_text: it is read from its beginning to its end, so a compressed file is not decompressed first.
        is_uploaded: whether a service takes uploads of it.
    """

    suffixes: tuple[str, ...]
    media_type: str
    reader: str
    writer: str
    is_text: bool = False
    is_uploaded: bool = True


FORMATS: Table[Format] = Table("format")
FORMATS.add(
    "parquet",
    Format(
        (".parquet", ".pq"),
        "application/vnd.apache.parquet",
        "complete_fn.rows.readers:stream_parquet",
        "complete_fn.rows.writers:ParquetWriter",
    ),
)
FORMATS.add(
    "csv",
    Format(
        (".csv",), "text/csv", "complete_fn.rows.readers:stream_csv", "complete_fn.rows.writers:CsvWriter", is_text=True
    ),
)
FORMATS.add(
    "jsonl",
    Format(
        (".jsonl", ".ndjson"),
        "application/x-ndjson",
        "complete_fn.rows.readers:stream_jsonl",
        "complete_fn.rows.writers:JsonlWriter",
        is_text=True,
    ),
)
FORMATS.add(
    "arrow",
    Format(
        (".arrow", ".feather", ".ipc"),
        "application/vnd.apache.arrow.stream",
        "complete_fn.rows.readers:stream_arrow",
        "complete_fn.rows.writers:ArrowWriter",
        is_uploaded=False,
    ),
)


def format_of(suffix: str) -> str | None:
    """The name of the format that a file name's suffix tells; None for none."""
    return next((name for name, found in FORMATS.items() if suffix.lower() in found.suffixes), None)


@dataclass(frozen=True, slots=True)
class TablePlace:
    """A file, or `-` for stdin or stdout, with its format and compression."""

    name: str
    format: str
    compression: str | None = None

    @property
    def piped(self) -> bool:
        return self.name == "-"


def place_of(name: str, wanted: str | None = None, default: str | None = None) -> TablePlace:
    """Where `name` points: its format by suffix, for `-` the `wanted` one.

    Raises:
        InputError: neither the name nor `wanted` says which format.
    """
    path = Path(name)
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = (path.with_suffix("") if compression else path).suffix
    found = wanted if name == "-" else format_of(suffix) or wanted
    if found is None and default is None:
        what = "stdin" if name == "-" else f"{name!r}"
        raise InputError(f"The format of {what} is not known. Say --format {'|'.join(FORMATS)}.")
    return TablePlace(name, found or default or "", compression)


class Rows(Protocol):
    """The rows of an input: for prompts by column, and for the output as they were."""

    @property
    def count(self) -> int: ...
    @property
    def names(self) -> list[str]: ...
    def limit(self, rows: int) -> Rows: ...

    def column(self, name: str) -> Any:
        """[n] the column's values; what is not UTF-8 in them stays as bytes, so that its row fails alone."""
        ...

    def table(self, schema: Any = None) -> pa.Table:
        """The columns; those of a JSONL in the types of `schema`, if given, where text takes what has no other type."""
        ...


@dataclass(frozen=True)
class TableRows:
    """Rows of a columnar file or a CSV, whose columns are text, kept as they are."""

    arrow: pa.Table

    @property
    def count(self) -> int:
        return int(self.arrow.num_rows)

    @property
    def names(self) -> list[str]:
        return list(self.arrow.column_names)

    def limit(self, rows: int) -> TableRows:
        return replace(self, arrow=self.arrow.slice(0, rows))

    def column(self, name: str) -> Any:
        if self.names.count(name) > 1:
            raise InputError(f"The input has {self.names.count(name)} columns named {name!r}; rename one.")
        return self.arrow.column(name)

    def table(self, schema: Any = None) -> pa.Table:
        return self.arrow


@dataclass(frozen=True)
class LineRows:
    """Rows of a JSONL file. The lines are kept, so that they can be written again byte for byte."""

    lines: list[bytes]

    @property
    def count(self) -> int:
        return len(self.lines)

    @cached_property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.objects() for name in row))

    def objects(self) -> Iterator[dict[str, Any]]:
        for line in self.lines:
            yield json.loads(line.decode("utf-8", "surrogateescape"))

    def limit(self, rows: int) -> LineRows:
        return LineRows(self.lines[:rows])

    def column(self, name: str) -> Any:
        return text_column([json_text(row.get(name)) for row in self.objects()])

    def table(self, schema: Any = None) -> pa.Table:
        """Columns of the types that their values have; mixed ones as JSON text, lone surrogates as their escapes."""
        rows = [{clean(name): clean(value) for name, value in row.items()} for row in self.objects()]
        names = [clean(name) for name in self.names] if schema is None else schema.names
        kinds = {} if schema is None else {field.name: field.type for field in schema}
        return pa.table({name: json_column([row.get(name) for row in rows], kinds.get(name)) for name in names})

    def schema(self) -> pa.Schema:
        """That of `table`, for `common_schema`."""
        table = self.table()
        fields = zip(table.schema, table.columns, strict=True)
        return pa.schema([field.with_metadata(EXACT) if beyond_float(c) else field for field, c in fields])


def beyond_float(column: Any) -> bool:
    if not pa.types.is_integer(column.type):
        return False
    found = pc.min_max(column).as_py()
    return any(abs(value or 0) > 2**53 for value in found.values())


def json_column(values: list[Any], kind: Any = None) -> pa.Array:
    """Args: kind: the type to have, `MIXED` for JSON text; None takes that of the values."""
    try:
        found = pa.array([json_text(v) for v in values] if kind == MIXED else values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        found = pa.array([json_text(v) for v in values], MIXED)
    return found.cast(pa.string()) if pa.types.is_null(found.type) else found


def common_schema(first: pa.Schema | None, second: pa.Schema) -> pa.Schema:
    """The schema of windows of JSONL that have these: where a column's types differ it is `MIXED`, but numbers are
    float64 if that holds all of them."""
    if first is None:
        return second
    fields = {field.name: field for field in second}
    for field in first:
        fields[field.name] = common_field(field, fields.get(field.name, field))
    names = [*first.names, *(n for n in second.names if n not in first.names)]
    return pa.schema([fields[name] for name in names])


def common_field(a: pa.Field, b: pa.Field) -> pa.Field:
    exact = a.metadata or b.metadata
    numbers = all(pa.types.is_integer(f.type) or pa.types.is_floating(f.type) for f in (a, b))
    kind = a.type if a.type == b.type else pa.float64() if numbers and not exact else MIXED
    return pa.field(a.name, kind, metadata=exact)


def json_text(value: Any) -> str | None:
    """A JSON value as text: a string as it is, null as None, anything else as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def clean(value: Any) -> Any:
    """The value with lone surrogates written as their escapes, as Arrow's strings are UTF-8."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [clean(v) for v in value]
    return {clean(k): clean(v) for k, v in value.items()} if isinstance(value, dict) else value
