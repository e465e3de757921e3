"""`FORMATS` lists the formats of table files. A suffix tells a file's format. `Rows` can be written back unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import InputError
from complete_fn.registry import Table
from complete_fn.text import decode_bytes, escape_surrogates, text_column

MIXED = pa.large_string()  # the type of a JSONL column whose values have several types
EXACT = {b"complete_fn": b"exact"}  # marks a JSONL column with integers that float64 cannot hold
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


@dataclass(frozen=True)
class Format:
    """A format of table files.

    Attributes:
        suffixes: the ends of file names that tell this format.
        media_type: the format's type in HTTP headers.
        reader: `module:name`, called as reader(file, source: FileSource) -> Iterator[Rows].
        writer: `module:name` of a `writers.Writer`.
        is_text: files are read from beginning to end, so a compressed file need not be decompressed first.
        is_uploaded: whether a service accepts uploads of this format.
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
    """The name of the format with this file suffix; None if no format has it."""
    return next((name for name, found in FORMATS.items() if suffix.lower() in found.suffixes), None)


@dataclass(frozen=True, slots=True)
class TablePlace:
    """A file, or `-` for stdin or stdout, with its format and compression.

    Attributes:
        escape_formulas: whether text of a CSV that a spreadsheet would run as a formula gets an apostrophe in front.
    """

    name: str
    format: str
    compression: str | None = None
    escape_formulas: bool = False

    @property
    def piped(self) -> bool:
        return self.name == "-"


def place_of(name: str, wanted: str | None = None, default: str | None = None) -> TablePlace:
    """The place that `name` means. Its format is the suffix's, else `wanted`; for `-` always `wanted`.

    Raises:
        InputError: Neither the name nor `wanted` tells the format, and there is no `default`.
    """
    path = Path(name)
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = (path.with_suffix("") if compression else path).suffix
    found = wanted if name == "-" else format_of(suffix) or wanted
    if found is None and default is None:
        what = "stdin" if name == "-" else f"{name!r}"
        raise InputError(f"The format of {what} is not known. Say --format {'|'.join(FORMATS)}.")
    return TablePlace(name, found or default or "", compression)


def escaping(place: TablePlace, escape_formulas: bool) -> TablePlace:
    """The place, with formulas escaped if asked for.

    Raises:
        InputError: The place is no CSV.
    """
    if not escape_formulas:
        return place
    if place.format != "csv":
        raise InputError(f"escape_formulas is for CSV, not for {place.format}. Leave it out.")
    return replace(place, escape_formulas=True)


class Rows(Protocol):
    """The rows of an input: prompts are made from their columns, and the output repeats them unchanged."""

    @property
    def count(self) -> int: ...
    @property
    def names(self) -> list[str]: ...
    def limit(self, rows: int) -> Rows: ...

    def column(self, name: str) -> Any:
        """[n] the column's values. Text that is not UTF-8 stays as bytes, so that only its own row fails."""
        ...

    def columns(self, names: Iterable[str]) -> dict[str, Any]:
        """`column` for each of the names, in one pass over the rows."""
        ...

    def table(self, schema: Any = None) -> pa.Table:
        """The rows as a table. JSONL columns get the types of `schema`, if given, or text if a value does not fit."""
        ...


@dataclass(frozen=True)
class TableRows:
    """Rows of a columnar file, or of a CSV, whose columns are all text."""

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
        places = self.arrow.schema.get_all_field_indices(name)
        if len(places) > 1:
            raise InputError(f"The input has {len(places)} columns named {name!r}; rename one.")
        return self.arrow.column(name)

    def columns(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: self.column(name) for name in names}

    def table(self, schema: Any = None) -> pa.Table:
        return self.arrow


@dataclass(frozen=True)
class LineRows:
    """Rows of a JSONL file. The lines are kept, so that they can be written back byte for byte."""

    lines: list[bytes]

    @property
    def count(self) -> int:
        return len(self.lines)

    @cached_property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.objects() for name in row))

    def objects(self) -> Iterator[dict[str, Any]]:
        for line in self.lines:
            yield json.loads(decode_bytes(line))

    def limit(self, rows: int) -> LineRows:
        return LineRows(self.lines[:rows])

    def column(self, name: str) -> Any:
        return self.columns([name])[name]

    def columns(self, names: Iterable[str]) -> dict[str, Any]:
        texts: dict[str, list[str | None]] = {name: [] for name in names}
        for row in self.objects():
            for name, values in texts.items():
                values.append(json_text(row.get(name)))
        return {name: text_column(values) for name, values in texts.items()}

    def table(self, schema: Any = None) -> pa.Table:
        """Columns have the types of their values, or JSON text if types are mixed. Lone surrogates become escapes."""
        rows = [{clean(name): clean(value) for name, value in row.items()} for row in self.objects()]
        names = [clean(name) for name in self.names] if schema is None else schema.names
        kinds = {} if schema is None else {field.name: field.type for field in schema}
        return pa.table({name: json_column([row.get(name) for row in rows], kinds.get(name)) for name in names})

    def schema(self) -> pa.Schema:
        """The schema of `table()`, with the mark `EXACT`, for `common_schema`."""
        table = self.table()
        fields = zip(table.schema, table.columns, strict=True)
        return pa.schema([field.with_metadata(EXACT) if beyond_float(c) else field for field, c in fields])


def beyond_float(column: Any) -> bool:
    if not pa.types.is_integer(column.type):
        return False
    found = pc.min_max(column).as_py()
    return any(abs(value or 0) > 2**53 for value in found.values())


def json_column(values: list[Any], kind: Any = None) -> pa.Array:
    """The values as an array of type `kind`; `MIXED` means JSON text, None the type of the values."""
    try:
        found = pa.array([json_text(v) for v in values] if kind == MIXED else values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        found = pa.array([json_text(v) for v in values], MIXED)
    return found.cast(pa.string()) if pa.types.is_null(found.type) else found


def common_schema(first: pa.Schema | None, second: pa.Schema) -> pa.Schema:
    """One schema for windows of JSONL with these two.

    A column whose types differ becomes `MIXED`, but a column of numbers becomes float64 if that holds them all.
    """
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
    """A JSON value as text: a string stays as it is, null becomes None, any other value JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def clean(value: Any) -> Any:
    """The value with escapes in place of lone surrogates, because Arrow's strings are UTF-8."""
    if isinstance(value, str):
        return escape_surrogates(value)
    if isinstance(value, list):
        return [clean(v) for v in value]
    return {clean(k): clean(v) for k, v in value.items()} if isinstance(value, dict) else value
