"""Uploaded files: in the service's folder under ids of our own, listed in the store by tenant."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import sqlalchemy as sa

from complete_fn.errors import InputError, NotFoundError, TooLargeError
from complete_fn.files import READERS, SUFFIXES, Rows, TableRows
from complete_fn.service_tables import files
from complete_fn.store import Store

TABLE_FORMATS = ("parquet", "csv", "jsonl")
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a tenant; `name` is what the tenant called it, and says its format."""

    id: str
    tenant: str
    name: str
    purpose: str
    bytes: int
    created_at: float

    @property
    def format(self) -> str:
        """Raises:
        InputError: the name does not end in a format that is taken.
        """
        found = SUFFIXES.get(Path(self.name).suffix.lower(), "")
        if found not in TABLE_FORMATS:
            raise InputError(f"The file {self.name!r} must be one of .parquet, .csv, .jsonl, by its name's end.")
        return found


class Uploads:
    """The files of one service."""

    def __init__(self, store: Store, folder: Path, limit: int) -> None:
        self.store, self.folder, self.limit = store, folder, limit
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, upload: Upload) -> Path:
        return self.folder / upload.id

    def save(self, tenant: str, name: str, purpose: str, source: BinaryIO) -> Upload:
        """Raises:
        TooLargeError: more bytes than the limit; nothing of them is kept.
        """
        with self.writing(tenant, name, purpose) as (sink, made):
            written = 0
            while chunk := source.read(CHUNK):
                written += len(chunk)
                if written > self.limit:
                    raise TooLargeError(f"The file is larger than this service takes ({self.limit:,} bytes).")
                sink.write(chunk)
        return made[0]

    @contextmanager
    def writing(
        self, tenant: str, name: str, purpose: str, file_id: str | None = None
    ) -> Iterator[tuple[BinaryIO, list[Upload]]]:
        """A new file to write to; once it is whole, its `Upload` is in the list, else nothing of it is left."""
        file_id = file_id or f"file-{secrets.token_hex(12)}"
        made: list[Upload] = []
        beside = self.folder / f".{file_id}.{secrets.token_hex(4)}.part"
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
                yield sink, made
                size = sink.tell()
            made.append(Upload(file_id, tenant, name[-255:], purpose, size, time.time()))
            os.replace(beside, self.folder / file_id)
            with self.store.write() as connection:
                connection.execute(files.delete().where(files.c.id == file_id))
                connection.execute(files.insert().values(asdict(made[0])))
        finally:
            beside.unlink(missing_ok=True)

    def get(self, tenant: str, file_id: str) -> Upload:
        """Raises:
        NotFoundError: the tenant has no such file.
        """
        return self.chosen((files.c.tenant == tenant) & (files.c.id == file_id), 1, file_id)[0]

    def newest(self, tenant: str, limit: int, after: str | None, purpose: str | None) -> list[Upload]:
        """The tenant's files, newest first, from behind the file `after` on."""
        which = files.c.tenant == tenant
        if purpose is not None:
            which = which & (files.c.purpose == purpose)
        if after is not None:
            last = self.get(tenant, after)
            which = which & (sa.tuple_(files.c.created_at, files.c.id) < sa.tuple_(last.created_at, last.id))
        return self.chosen(which, limit)

    def chosen(self, which: Any, limit: int, wanted: str | None = None) -> list[Upload]:
        columns = [files.c[f.name] for f in fields(Upload)]
        last_first = (
            sa.select(*columns).where(which).order_by(files.c.created_at.desc(), files.c.id.desc()).limit(limit)
        )
        with self.store.read() as connection:
            found = [Upload(*row) for row in connection.execute(last_first)]
        if wanted is not None and not found:
            raise NotFoundError(f"There is no file {wanted!r}.")
        return found

    def delete(self, upload: Upload) -> None:
        with self.store.write() as connection:
            connection.execute(files.delete().where(files.c.id == upload.id))
        self.path(upload).unlink(missing_ok=True)


def read_table(path: Path, name: str, kind: str, most_bytes: int, most_rows: int) -> Rows:
    """The rows of an uploaded table.

    Raises:
        InputError: it is not whole, or not of its format.
        TooLargeError: more rows or, once decoded, more bytes than allowed.
    """
    try:
        rows = read_parquet(path, most_bytes, most_rows) if kind == "parquet" else READERS[kind](path.read_bytes())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name!r} cannot be read as {kind}: {str(error).splitlines()[0]}.") from error
    except RecursionError as error:
        raise InputError(f"{name!r} has a value that is nested too deep.") from error
    if rows.count > most_rows:
        raise TooLargeError(f"{name!r} has {rows.count:,} rows; this service takes {most_rows:,} in a job.")
    return rows


def read_parquet(path: Path, most_bytes: int, most_rows: int) -> Rows:
    """Batch by batch: a small Parquet file can decode to any size, whatever its footer says."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if file.metadata.num_rows > most_rows:
            raise TooLargeError(f"The table has {file.metadata.num_rows:,} rows; this service takes {most_rows:,}.")
        batches, size = [], 0
        for batch in file.iter_batches(batch_size=8_192):
            size += batch.nbytes
            if size > most_bytes:
                raise TooLargeError(f"The table decodes to more than {most_bytes:,} bytes. Split it.")
            batches.append(batch)
        return TableRows(pa.Table.from_batches(batches, file.schema_arrow))
