"""Writing a table's rows with new columns: whole or not at all, next to its place and then renamed."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import InputError
from complete_fn.files import LineRows, Place, Rows
from complete_fn.plan.batch import to_texts

BATCH_ROWS = 8_192


def refuse_output(place: Place, overwrite: bool) -> None:
    """Everything about the output that can be known before work is paid for.

    Raises:
        InputError: it exists and may not be overwritten, or cannot be written.
    """
    if place.piped:
        if sys.stdout.isatty() and place.format in ("parquet", "arrow"):
            raise InputError(f"{place.format} is nothing for a terminal: write to a file with -o, or --format jsonl.")
        return
    if is_device(Path(place.name)):
        return
    path = Path(place.name).resolve()
    if path.is_dir():
        raise InputError(f"The output {place.name!r} is a folder.")
    refuse_existing(place, overwrite)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"The output {place.name!r} cannot be written: {error.strerror}.") from error


def refuse_existing(place: Place, overwrite: bool) -> None:
    if not overwrite and Path(place.name).exists():
        raise InputError(f"The output {place.name!r} exists. Say --overwrite, or name another file.")


def is_device(path: Path) -> bool:
    """A pipe, terminal or /dev/null: written straight into, as there is nothing to replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_rows(place: Place, rows: Rows, new: Mapping[str, Any], overwrite: bool) -> None:
    """Write the input's rows with the new columns behind them.

    Raises:
        InputError: the output cannot be written; nothing of it is left behind.
    """
    path = Path(place.name)
    try:
        if place.piped:
            sys.stdout.flush()
            # A buffer of our own: with PYTHONUNBUFFERED sys.stdout.buffer is raw and writes only a part.
            with open(sys.stdout.fileno(), "wb", closefd=False) as sink:
                write_to(sink, place, rows, new)
        elif is_device(path):
            with path.open("wb") as device:
                write_to(device, place, rows, new)
        else:
            write_whole(path.resolve(), place, rows, new, overwrite)
    except BrokenPipeError:
        raise
    except OSError as error:
        remedy = "The answers are kept: the same command writes them without computing any again."
        raise InputError(f"The output {place.name!r} cannot be written: {error.strerror or error}. {remedy}") from error


def write_whole(path: Path, place: Place, rows: Rows, new: Mapping[str, Any], overwrite: bool) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as sink:
            write_to(sink, place, rows, new)
            sink.flush()
            os.fsync(sink.fileno())
        refuse_existing(place, overwrite)
        os.replace(beside, path)
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the rename itself outlive a power failure, where folders can be opened."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_to(sink: BinaryIO, place: Place, rows: Rows, new: Mapping[str, Any]) -> None:
    if place.compression is None:
        WRITERS[place.format](sink, place, rows, new)
        return
    own = os.fdopen(os.dup(sink.fileno()), "wb")  # Arrow closes what it is given
    with pa.CompressedOutputStream(pa.PythonFile(own, "w"), place.compression) as packed:
        WRITERS[place.format](packed, place, rows, new)


def with_columns(rows: Rows, new: Mapping[str, Any]) -> pa.Table:
    table = rows.table()
    for name, column in new.items():
        table = table.append_column(name, column)
    return table


def write_parquet(sink: Any, place: Place, rows: Rows, new: Mapping[str, Any]) -> None:
    from pyarrow import parquet

    parquet.write_table(with_columns(rows, new), sink)


def write_arrow(sink: Any, place: Place, rows: Rows, new: Mapping[str, Any]) -> None:
    """The file format; on stdout, which cannot seek, the stream format."""
    table = with_columns(rows, new)
    opened = pa.ipc.new_stream if place.piped else pa.ipc.new_file
    with opened(sink, table.schema) as writer:
        writer.write_table(table)


def write_csv(sink: Any, place: Place, rows: Rows, new: Mapping[str, Any]) -> None:
    """NULL is an empty field and an empty text a quoted one; what has no text form is JSON."""
    table = with_columns(rows, new)
    sink.write((",".join(csv_field(n) for n in table.column_names) + "\n").encode())
    for batch in table.to_batches(BATCH_ROWS):
        columns = [csv_texts(column) for column in batch.columns]
        text = "".join(",".join(map(csv_field, row)) + "\n" for row in zip(*columns, strict=True))
        sink.write(text.encode("utf-8", "surrogateescape"))


def csv_texts(column: Any) -> list[str | None]:
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return [None if v is None else as_json(v) for v in column.to_pylist()]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return list(to_texts(pc.cast(column, pa.large_string())))


def csv_field(text: str | None) -> str:
    if text is None:
        return ""
    quoted = not text or any(c in text for c in ',"\r\n') or text != text.strip()
    return '"' + text.replace('"', '""') + '"' if quoted else text


def write_jsonl(sink: Any, place: Place, rows: Rows, new: Mapping[str, Any]) -> None:
    low = 0
    for batch in pa.table(dict(new)).to_batches(BATCH_ROWS):
        chunk = io.BytesIO()
        for line, added in zip(json_lines(rows, low, batch.num_rows), batch.to_pylist(), strict=True):
            chunk.write(spliced(line, as_json(added).encode()))
        sink.write(chunk.getvalue())
        low += batch.num_rows


def json_lines(rows: Rows, low: int, count: int) -> Iterator[bytes]:
    if isinstance(rows, LineRows):
        yield from rows.lines[low : low + count]
        return
    for batch in rows.table().slice(low, count).to_batches():
        columns = [(json.dumps(n, ensure_ascii=False), json_values(c)) for n, c in zip(rows.names, batch, strict=True)]
        for number in range(batch.num_rows):
            yield ("{" + ", ".join(f"{name}: {values[number]}" for name, values in columns) + "}").encode()


def json_values(column: Any) -> list[str]:
    """Each value as JSON; text that is not UTF-8 keeps its bytes as escaped lone surrogates."""
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    values = to_texts(column) if text else column.to_pylist()
    return [as_json(v) for v in values]


def spliced(line: bytes, added: bytes) -> bytes:
    """The object of a JSONL line with the members of another behind its own."""
    head = line.rstrip()[:-1].rstrip()
    return head + (b"" if head.endswith(b"{") else b", ") + added[1:] + b"\n"


def as_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=json_form)
    return text if text.isascii() or encodable(text) else json.dumps(value, default=json_form)


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_form(value: Any) -> Any:
    """JSON for the Arrow values that have none of their own: dates as ISO 8601, bytes as base64."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.total_seconds() if isinstance(value, timedelta) else str(value)


WRITERS = {"parquet": write_parquet, "csv": write_csv, "jsonl": write_jsonl, "arrow": write_arrow}
