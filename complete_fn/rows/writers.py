"""Writers write rows with new columns, window by window, to a temporary file that is then renamed to the output."""

from __future__ import annotations

import io
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import InputError, StorageError
from complete_fn.registry import resolve
from complete_fn.rows.formats import FORMATS, LineRows, Rows, TablePlace, clean
from complete_fn.rows.json_values import as_json, json_line, json_values, values_of
from complete_fn.rows.object_storage import Storage, remote
from complete_fn.text import is_utf8_column, restore_bytes, to_texts

BATCH_ROWS = 8_192
# With these a cell begins that a spreadsheet may take for a formula: OWASP's list, with the forms of full width.
FORMULA = "=+-@\t\r\n\0\uff1d\uff0b\uff0d\uff20"
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)


def refuse_clash(names: Collection[str], column: str, with_details: bool, option: str) -> None:
    """Args: option: where the caller names the new column.

    Raises:
        InputError: A new column has the name of one of the rows' own columns.
    """
    for name in (column, f"{column}_details") if with_details else (column,):
        if name in names:
            raise InputError(f"The input already has a column {name!r}. Name the new one with {option}.")


def refuse_output(place: TablePlace, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work is paid for.

    Raises:
        InputError: The output exists and `overwrite` is False, or it cannot be written.
    """
    if place.piped:
        if sys.stdout.isatty() and place.format in ("parquet", "arrow"):
            raise InputError(f"{place.format} is nothing for a terminal: write to a file with -o, or --format jsonl.")
        return
    if remote(place.name):
        storage, name = object_of(place)
        if not overwrite and storage.exists(name):
            raise InputError(f"The output {place.name!r} exists. Say --overwrite, or name another file.")
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


def refuse_existing(place: TablePlace, overwrite: bool) -> None:
    if not overwrite and Path(place.name).exists():
        raise InputError(f"The output {place.name!r} exists. Say --overwrite, or name another file.")


def object_of(place: TablePlace) -> tuple[Storage, str]:
    """(storage, key) of an s3:// or gs:// URL."""
    folder, _, name = place.name.rpartition("/")
    return Storage(folder), name


def is_device(path: Path) -> bool:
    """Whether the path is a pipe, a terminal or /dev/null. Those are written directly: nothing is there to replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def writing(place: TablePlace, overwrite: bool, schema: Any = None) -> Iterator[Writer]:
    """A writer of rows with new columns behind them. The output is in place when the block ends without an error.

    Args:
        schema: the schema of all windows of a JSONL, as `Writer` takes it.

    Raises:
        InputError: The output cannot be written; no part of it is left behind.
    """
    path = Path(place.name)
    try:
        if place.piped:
            sys.stdout.flush()
            # Our own buffer: with PYTHONUNBUFFERED sys.stdout.buffer is raw, and a raw write may write only a part.
            with open(sys.stdout.fileno(), "wb", closefd=False) as out, written_to(out, place, schema) as writer:
                yield writer
        elif remote(place.name):
            storage, name = object_of(place)
            with storage.writing(name) as sink, written_to(sink, place, schema) as writer:
                yield writer
        elif is_device(path):
            with path.open("wb") as device, written_to(device, place, schema) as writer:
                yield writer
        else:
            with whole_file(path.resolve(), place, overwrite) as sink, written_to(sink, place, schema) as writer:
                yield writer
    except BrokenPipeError:
        raise
    except (OSError, StorageError) as error:
        remedy = "The answers are kept: the same command writes them without computing any again."
        why = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise InputError(f"The output {place.name!r} cannot be written: {why}. {remedy}") from error


@contextmanager
def whole_file(path: Path, place: TablePlace, overwrite: bool) -> Iterator[IO[bytes]]:
    # A random name, not the process id: in containers that share a volume every id may be 1.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    opened = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(opened, "wb") as sink:
            yield sink
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
    """Make the rename survive a power failure, on systems where a folder can be opened."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def written_to(sink: IO[bytes], place: TablePlace, schema: Any = None) -> Iterator[Writer]:
    """A writer of the place's format into an open file, which stays open."""
    with ExitStack() as stack:
        target: Any = sink
        if place.compression is not None:
            own = os.fdopen(os.dup(sink.fileno()), "wb")  # a duplicate, because Arrow closes the file it gets
            target = stack.enter_context(pa.CompressedOutputStream(pa.PythonFile(own, "w"), place.compression))
        writer: Writer = resolve(FORMATS[place.format].writer)(target, place, schema)
        try:
            yield writer
        except BaseException:
            with suppress(Exception):  # close it now: else Arrow's writer closes itself after its file is gone
                writer.close()
            raise
        writer.close()


class Writer:
    """Takes windows of rows, each with its new columns.

    Args:
        schema: the columns of a JSONL that comes in several windows; None takes the columns of the first.
    """

    def __init__(self, sink: Any, place: TablePlace, schema: Any = None) -> None:
        self.sink, self.place, self.schema = sink, place, schema

    def write(self, rows: Rows, new: Mapping[str, Any]) -> None:
        """Raises:
        InputError: The format, or a column's type in earlier windows, cannot hold a value.
        """
        try:
            self.put(rows, new)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise InputError(
                f"The rows cannot be written as {self.place.format}: {str(error).strip()[:500]} "
                "Choose an output of another format: stored answers are not computed again."
            ) from error

    def put(self, rows: Rows, new: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Write the format's footer, if it has one."""

    def joined(self, rows: Rows, new: Mapping[str, Any]) -> pa.Table:
        table = rows.table(self.schema)
        for name, column in new.items():
            table = table.append_column(name, column)
        return table


class ArrowWriter(Writer):
    """Writes the file format, or on stdout, which cannot seek, the stream format. Bytes beyond UTF-8 are escaped."""

    inner: Any = None

    def put(self, rows: Rows, new: Mapping[str, Any]) -> None:
        table = self.joined(rows, new)
        for number, field in enumerate(table.schema):
            column = table.column(number)
            if not is_utf8_column(column):
                escaped = pa.array([clean(text) for text in to_texts(column)], field.type)
                table = table.set_column(number, field, escaped)
        if self.inner is None:
            self.inner = self.opened(table.schema)
        self.inner.write_table(table)

    def opened(self, schema: Any) -> Any:
        return (pa.ipc.new_stream if self.place.piped else pa.ipc.new_file)(self.sink, schema)

    def close(self) -> None:
        self.inner.close()


class ParquetWriter(ArrowWriter):
    def opened(self, schema: Any) -> Any:
        from pyarrow import parquet

        return parquet.ParquetWriter(self.sink, schema)


class CsvWriter(Writer):
    """Writes NULL as an empty field, an empty text as a quoted field, and values without a text form as JSON."""

    begun = False

    def put(self, rows: Rows, new: Mapping[str, Any]) -> None:
        table = self.joined(rows, new)
        if not self.begun:
            self.sink.write((",".join(map(self.field, table.column_names)) + "\n").encode())
            self.begun = True
        for batch in table.to_batches(BATCH_ROWS):
            columns = [csv_texts(column) for column in batch.columns]
            text = "".join(",".join(map(self.field, row)) + "\n" for row in zip(*columns, strict=True))
            self.sink.write(restore_bytes(text))

    def field(self, text: str | None) -> str:
        return csv_field(without_formula(text) if text and self.place.escape_formulas else text)


class JsonlWriter(Writer):
    """Writes lines of JSONL unchanged. In other rows NaN and the infinities become null, because JSON lacks them."""

    def put(self, rows: Rows, new: Mapping[str, Any]) -> None:
        low = 0
        for batch in pa.table(dict(new)).to_batches(BATCH_ROWS):
            chunk = io.BytesIO()
            new_values = batch.to_pylist(maps_as_pydicts="lossy")
            for line, added in zip(json_lines(rows, low, batch.num_rows), new_values, strict=True):
                chunk.write(spliced(line, as_json(added).encode()))
            self.sink.write(chunk.getvalue())
            low += batch.num_rows


def csv_texts(column: Any) -> list[str | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not has_text(column.type):
        return [None if v is None else str(v) if isinstance(v, str | UUID) else as_json(v) for v in values_of(column)]
    return list(to_texts(pc.cast(column, pa.large_string())))


def has_text(kind: Any) -> bool:
    """Whether Arrow can cast every value of this type to text."""
    kinds = pa.types
    raw = kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_fixed_size_binary(kind)
    other = kinds.is_binary_view(kind) or kinds.is_interval(kind) or isinstance(kind, pa.BaseExtensionType)
    return not (kinds.is_nested(kind) or raw or other)


def csv_field(text: str | None) -> str:
    if text is None:
        return ""
    quoted = not text or any(c in text for c in ',"\r\n') or text != text.strip()
    return '"' + text.replace('"', '""') + '"' if quoted else text


def without_formula(text: str) -> str:
    """The text, with an apostrophe in front if a spreadsheet would run it as a formula. Numbers stay numbers."""
    return f"'{text}" if text[0] in FORMULA and not NUMBER.fullmatch(text) else text


def json_lines(rows: Rows, low: int, count: int) -> Iterator[bytes]:
    if isinstance(rows, LineRows):
        yield from rows.lines[low : low + count]
        return
    for batch in rows.table().slice(low, count).to_batches():
        columns = [(json_line(n), json_values(c)) for n, c in zip(rows.names, batch, strict=True)]
        for number in range(batch.num_rows):
            yield ("{" + ", ".join(f"{name}: {values[number]}" for name, values in columns) + "}").encode()


def spliced(line: bytes, added: bytes) -> bytes:
    """The line's JSON object with the members of `added` behind its own members."""
    head = line.rstrip()[:-1].rstrip()
    return head + (b"" if head.endswith(b"{") else b", ") + added[1:] + b"\n"
