"""Tables of any size are read in windows of bounded memory: Parquet, CSV, JSONL and Arrow IPC, compressed or not."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import InputError
from complete_fn.interrupts import end_if_abandoned
from complete_fn.registry import resolve
from complete_fn.rows.formats import FORMATS, LineRows, Rows, TableRows, clean
from complete_fn.rows.limits import NO_LIMITS, TableLimits
from complete_fn.text import decode_bytes

WINDOW_ROWS, WINDOW_BYTES = 200_000, 256 * 1024 * 1024  # a window ends at whichever comes first
PROMPT_WINDOW_BYTES = 256 * 1024 * 1024  # of what a template adds to a window's rows; planning takes three times that
BATCH_ROWS = 8_192
CSV_BLOCK = 32 * 1024 * 1024  # bytes of the longest row that a CSV may have; Arrow needs a row within a block
LINE_BYTES = 64 * 1024 * 1024  # bytes of the longest line that a JSONL may have; bounds memory


@dataclass(frozen=True, slots=True)
class WindowSize:
    """The most rows and bytes of a window of more than one row."""

    rows: int
    bytes: int


def usual_size() -> WindowSize:
    return WindowSize(WINDOW_ROWS, WINDOW_BYTES)


def size_for_prompts(own_bytes: int, mentions: int) -> WindowSize:
    """The size of windows whose prompts fit into memory together.

    Args:
        own_bytes: of the template, which each prompt has.
        mentions: how often the template names a column at most.
    """
    rows = PROMPT_WINDOW_BYTES // max(1, own_bytes)
    return WindowSize(max(1, min(WINDOW_ROWS, rows)), WINDOW_BYTES // max(1, mentions))


class Source(Protocol):
    """Rows that can be read repeatedly, window by window. There is always a first window, which may be empty."""

    def windows(self) -> Iterator[Rows]: ...


@dataclass(frozen=True)
class FileSource:
    """A file in one of `formats.FORMATS`.

    Attributes:
        name: the file's name in messages.
        open: opens the file at its beginning; the file is seekable unless it is compressed.
        limits: bounds of the decoded content.
        kept: an object that must live as long as the source.
        window: the size of its windows; None for the usual one.
    """

    name: str
    format: str
    open: Callable[[], Any]
    compression: str | None = None
    limits: TableLimits = NO_LIMITS
    kept: Any = None
    window: WindowSize | None = None

    def windows(self) -> Iterator[Rows]:
        """Raises:
        InputError: The file is missing, incomplete or not of its format; the message says where.
        TooLargeError: The file decodes to more rows, bytes or columns than the limits.
        """
        count = 0
        try:
            with self.opened() as source:
                for rows in resolve(FORMATS[self.format].reader)(source, self):
                    count += rows.count
                    self.limits.refuse_rows(count, self.name)
                    yield rows
        except (pa.ArrowException, OSError, EOFError) as error:
            first = (str(error).splitlines() or [""])[0].rstrip(".")
            hint = (
                "" if self.format == "csv" else " It may be damaged, still be being written, or its writer was killed."
            )
            raise InputError(f"{self.name} cannot be read as {self.format}: {first}.{hint}") from error
        except RecursionError as error:
            raise InputError(f"{self.name} has a value that is nested too deep.") from error

    @contextmanager
    def opened(self) -> Iterator[Any]:
        with ExitStack() as stack:
            try:
                raw = stack.enter_context(self.open())
            except OSError as error:
                raise InputError(f"{self.name} cannot be read: {error.strerror or error}.") from error
            if self.compression is None:
                yield raw
                return
            plain = pa.CompressedInputStream(pa.PythonFile(raw, "r"), self.compression)
            if FORMATS[self.format].is_text:
                yield io.BufferedReader(Counted(plain, self))
                return
            whole = stack.enter_context(tempfile.TemporaryFile())  # Parquet's footer is at the end: it needs seeking
            shutil.copyfileobj(io.BufferedReader(Counted(plain, self)), whole)
            whole.seek(0)
            yield whole


class Counted(io.RawIOBase):
    """A decompressed stream that raises an error once it is longer than the source's bound."""

    def __init__(self, plain: Any, source: FileSource) -> None:
        self.plain, self.source, self.count = plain, source, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        end_if_abandoned()
        found = self.plain.read(len(buffer))
        buffer[: len(found)] = found
        self.count += len(found)
        self.source.limits.refuse_bytes(self.count, self.source.name)
        return len(found)


# -- columns -------------------------------------------------------------------------------------------------------


def table_windows(schema: Any, batches: Iterable[Any], window: WindowSize | None) -> Iterator[TableRows]:
    """Gather batches into windows. With several windows dictionaries are decoded, because windows may have others."""
    held: list[Any] = []
    rows = size = 0
    most = window or usual_size()
    several = False
    for whole in batches:
        fitting = most.bytes * whole.num_rows // max(1, slice_size(whole, whole)) if whole.num_rows else 1
        step = max(1, min(BATCH_ROWS, most.rows, fitting))
        for low in range(0, whole.num_rows, step):
            end_if_abandoned()
            batch = whole.slice(low, step)
            taken = slice_size(batch, whole)
            if held and (rows + batch.num_rows > most.rows or size + taken > most.bytes):
                several = True
                yield table_rows(held, schema, several)
                held, rows, size = [], 0, 0
            held.append(batch)
            rows, size = rows + batch.num_rows, size + taken
    if held or not several:
        yield table_rows(held, schema, several)


def slice_size(batch: Any, whole: Any) -> int:
    """Bytes of a slice. Before pyarrow 24 string views have no `nbytes`; then the slice's share of the buffers."""
    try:
        return int(batch.nbytes)
    except pa.ArrowTypeError:
        return int(whole.get_total_buffer_size() * batch.num_rows // whole.num_rows)


def table_rows(batches: list[Any], schema: Any, decode: bool) -> TableRows:
    table = pa.Table.from_batches(batches, schema)
    if decode:
        for number, field in enumerate(schema):
            if pa.types.is_dictionary(field.type):
                table = table.set_column(number, field.name, pc.cast(table.column(number), field.type.value_type))
    return TableRows(table)


def stream_parquet(source: Any, asked: FileSource) -> Iterator[Rows]:
    from pyarrow import parquet

    if asked.limits != NO_LIMITS:
        refuse_bomb(source, asked)
    with parquet.ParquetFile(source) as file:
        width = max(1, len(file.schema))
        batches = file.iter_batches(batch_size=max(1, min(BATCH_ROWS, 1_000_000 // width)))
        yield from table_windows(file.schema_arrow, batches, asked.window)


def refuse_bomb(source: Any, asked: FileSource) -> None:
    """Refuse a small Parquet file that decodes to a huge table, whatever its footer says.

    The file is read once with its texts left encoded, and the decoded size is computed from the lengths.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(source) as file:
        asked.limits.refuse_columns(len(file.schema), asked.name)
        asked.limits.refuse_rows(file.metadata.num_rows, asked.name)
        leaves = [file.schema.column(n) for n in range(len(file.schema))]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    step = max(1, min(BATCH_ROWS, 1_000_000 // max(1, len(leaves))))
    source.seek(0)
    with parquet.ParquetFile(source, read_dictionary=texts) as file:
        size = 0
        for batch in file.iter_batches(batch_size=step):
            end_if_abandoned()
            size += sum(weight(column) for column in batch.columns)
            asked.limits.refuse_bytes(size, asked.name)
    source.seek(0)


def weight(column: Any) -> int:
    """Bytes of the array after its dictionaries are decoded."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(column.dictionary.cast(pa.large_binary()))
        return int(pc.sum(lengths.take(column.indices)).as_py() or 0) + 8 * len(column)
    if pa.types.is_struct(kind):
        return sum(weight(child) for child in column.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        values = pa.StructArray.from_arrays([column.keys, column.items], ["k", "v"]) if pa.types.is_map(kind) else None
        return weight(column.flatten() if values is None else values) + 8 * len(column)
    return int(column.nbytes)


def stream_arrow(source: Any, asked: FileSource) -> Iterator[Rows]:
    """Read the IPC file format or, if the file's mark is missing, the stream format."""
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if is_file:
        with pa.ipc.open_file(source) as file:
            asked.limits.refuse_columns(len(file.schema), asked.name)
            batches = (file.get_batch(n) for n in range(file.num_record_batches))
            yield from table_windows(file.schema, batches, asked.window)
    else:
        with pa.ipc.open_stream(source) as stream:
            asked.limits.refuse_columns(len(stream.schema), asked.name)
            yield from table_windows(stream.schema, stream, asked.window)


def stream_csv(source: Any, asked: FileSource) -> Iterator[Rows]:
    """All columns are read as text, so that they are written back unchanged. Empty is NULL; quoted empty is a text."""
    from pyarrow import csv as arrow_csv

    names = header(asked)
    parse = arrow_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=len(names) > 1)
    convert = arrow_csv.ConvertOptions(
        check_utf8=False,
        column_types=dict.fromkeys(names, pa.large_string()),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
        null_values=[""],
    )
    options = arrow_csv.ReadOptions(block_size=CSV_BLOCK, use_threads=False)
    stream = arrow_csv.open_csv(source, options, parse, convert)
    yield from table_windows(stream.schema, stream, asked.window)


def header(asked: FileSource) -> list[str]:
    """Raises:
    InputError: The file has no header line, or a header whose names are repeated or not UTF-8.
    """
    with asked.opened() as source:
        text = io.TextIOWrapper(source, "utf-8-sig", errors="surrogateescape", newline="")
        try:
            names = next(csv.reader(text), [])
        except csv.Error as error:
            raise InputError(f"The CSV's header cannot be read: {error}.") from error
        finally:
            text.detach()
    asked.limits.refuse_columns(len(names), asked.name)
    if not names:
        raise InputError("The CSV is empty: not even a header line.")
    if bad := [n for n in names if clean(n) != n]:
        raise InputError(f"The CSV's header has a name that is not UTF-8: {clean(bad[0])}.")
    (name, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise InputError(f"The CSV's header names {name!r} {times} times; rename one.")
    return names


# -- lines ---------------------------------------------------------------------------------------------------------


def stream_jsonl(source: Any, asked: FileSource) -> Iterator[Rows]:
    held: list[bytes] = []
    names: set[str] = set()
    size = count = 0
    most = asked.window or usual_size()
    for number, raw in enumerate(bounded_lines(source), 1):
        end_if_abandoned()
        line = (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).strip()
        if not line:
            continue
        names.update(parsed_object(line, number))
        asked.limits.refuse_columns(len(names), asked.name)
        if held and (len(held) >= most.rows or size + len(line) > most.bytes):
            yield LineRows(held)
            held, size = [], 0
        held.append(line)
        size, count = size + len(line), count + 1
    if held or not count:
        yield LineRows(held)


def bounded_lines(source: IO[bytes]) -> Iterator[bytes]:
    while line := source.readline(LINE_BYTES):
        if len(line) == LINE_BYTES:
            raise InputError(f"The JSONL has a line of more than {LINE_BYTES:,} bytes.")
        yield line


def parsed_object(line: bytes, number: int) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(decode_bytes(line))
    except ValueError as error:
        raise InputError(f"Line {number} of the JSONL is not JSON: {error}. Nothing was run.") from error
    if not isinstance(found, dict):
        raise InputError(f"Line {number} of the JSONL is no object but {type(found).__name__}. Nothing was run.")
    return found
