"""Tables in files: Parquet, CSV, JSONL and Arrow IPC, compressed or not, also on stdin. Read whole, before any work."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from complete_fn.errors import InputError
from complete_fn.prompts import text_column

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
FORMATS = ("parquet", "csv", "jsonl", "arrow")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
CSV_BLOCK = 64 * 1024 * 1024  # bytes; the longest row that a CSV may have


@dataclass(frozen=True, slots=True)
class Place:
    """A file, or `-` for stdin or stdout, with its format and compression."""

    name: str
    format: str
    compression: str | None = None

    @property
    def piped(self) -> bool:
        return self.name == "-"


def place_of(name: str, wanted: str | None = None, default: str | None = None) -> Place:
    """Where `name` points: its format by suffix, for `-` the `wanted` one.

    Raises:
        InputError: neither the name nor `wanted` says which format.
    """
    path = Path(name)
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    found = wanted if name == "-" else SUFFIXES.get(suffix, wanted)
    if found is None and default is None:
        what = "stdin" if name == "-" else f"{name!r}"
        raise InputError(f"The format of {what} is not known. Say --format {'|'.join(FORMATS)}.")
    return Place(name, found or default or "", compression)


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

    def table(self) -> pa.Table: ...


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

    def table(self) -> pa.Table:
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

    def table(self) -> pa.Table:
        """Columns of the types that their values have; mixed ones as JSON text, lone surrogates as their escapes."""
        names = {name: clean(name) for name in self.names}
        rows = [{name: clean(row.get(name)) for name in names} for row in self.objects()]
        return pa.table({clear: json_column([row[name] for row in rows]) for name, clear in names.items()})


def json_column(values: list[Any]) -> pa.Array:
    try:
        found = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        found = pa.array([json_text(v) for v in values], pa.large_string())
    return found.cast(pa.string()) if pa.types.is_null(found.type) else found


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


def read_rows(place: Place) -> tuple[Rows, bytes | None]:
    """The rows, and for stdin the bytes they came from.

    Raises:
        InputError: the file is not there, not whole, or not of its format; the message says where.
    """
    what = "stdin" if place.piped else repr(place.name)
    try:
        raw = sys.stdin.buffer.read() if place.piped else Path(place.name).read_bytes()
        source = raw if place.compression is None else pa.input_stream(io.BytesIO(raw), place.compression).read()
    except OSError as error:
        raise InputError(f"{what} cannot be read: {error.strerror or error}.") from error
    try:
        return READERS[place.format](source), raw if place.piped else None
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0].rstrip(".")
        hint = " It may be damaged, still be being written, or its writer was killed." if place.format != "csv" else ""
        raise InputError(f"{what} cannot be read as {place.format}: {first}.{hint}") from error


def read_parquet(source: bytes) -> Rows:
    from pyarrow import parquet

    return TableRows(parquet.ParquetFile(pa.BufferReader(source)).read())


def read_arrow(source: bytes) -> Rows:
    """The IPC file format or, without its mark, the stream format."""
    opened = pa.ipc.open_file if source.startswith(b"ARROW1") else pa.ipc.open_stream
    return TableRows(opened(pa.BufferReader(source)).read_all())


def read_csv(source: bytes) -> Rows:
    """Every column as text, so that it is written back as it was. An empty field is NULL, a quoted empty one is not."""
    from pyarrow import csv as arrow_csv

    head = io.TextIOWrapper(io.BytesIO(source), "utf-8-sig", errors="surrogateescape", newline="")
    names = next(csv.reader(head), [])
    if not names:
        raise InputError("The CSV is empty: not even a header line.")
    if bad := [n for n in names if clean(n) != n]:
        raise InputError(f"The CSV's header has a name that is not UTF-8: {clean(bad[0])}.")
    if again := [n for n in names if names.count(n) > 1]:
        raise InputError(f"The CSV's header names {again[0]!r} {len(again)} times; rename one.")
    parse = arrow_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=len(names) > 1)
    convert = arrow_csv.ConvertOptions(
        check_utf8=False,
        column_types=dict.fromkeys(names, pa.large_string()),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
        null_values=[""],
    )
    options = arrow_csv.ReadOptions(block_size=min(len(source), CSV_BLOCK))
    return TableRows(arrow_csv.read_csv(io.BytesIO(source), options, parse, convert))


def read_jsonl(source: bytes) -> Rows:
    lines = []
    for number, raw in enumerate(source.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        line = raw.strip()
        if line:
            refuse_no_object(line, number)
            lines.append(line)
    return LineRows(lines)


def refuse_no_object(line: bytes, number: int) -> None:
    try:
        found = json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise InputError(f"Line {number} of the JSONL is not JSON: {error}. Nothing was run.") from error
    if not isinstance(found, dict):
        raise InputError(f"Line {number} of the JSONL is no object but {type(found).__name__}. Nothing was run.")


READERS = {"parquet": read_parquet, "csv": read_csv, "jsonl": read_jsonl, "arrow": read_arrow}
