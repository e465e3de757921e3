"""Uploaded files lie in the service's storage under ids of our own; the store lists them by tenant."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, BinaryIO

import sqlalchemy as sa

from complete_fn.errors import InputError, NotFoundError, StorageFullError, TooLargeError
from complete_fn.interrupts import end_if_abandoned
from complete_fn.jobs.list_filters import EVERY_FILE, FileFilter
from complete_fn.jobs.storage_quota import StorageQuota, full
from complete_fn.rows.formats import FORMATS, format_of
from complete_fn.rows.limits import TableLimits
from complete_fn.rows.object_storage import Storage
from complete_fn.rows.readers import FileSource
from complete_fn.store.job_tables import files
from complete_fn.store.store import Store

CHUNK = 1 << 20
DAY = 86_400.0
MOST_AT_ONCE = 1_000  # files that one round of upkeep deletes


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a tenant. `name` is the tenant's own name for the file; its ending says the format."""

    id: str
    tenant: str
    name: str
    purpose: str
    bytes: int
    created_at: float
    expires_at: float | None

    @property
    def format(self) -> str:
        """The file's format, by its name.

        Raises:
            InputError: The name does not end like a format that can be uploaded.
        """
        found = format_of(Path(self.name).suffix)
        if found is None or not FORMATS[found].is_uploaded:
            taken = ", ".join(f".{name}" for name, kind in FORMATS.items() if kind.is_uploaded)
            raise InputError(f"The file {self.name!r} must be one of {taken}, by its name's end.")
        return found


class Uploads:
    """The files of one service, in its storage.

    Args:
        limit: The most bytes of one file.
        days: A file is deleted after so many days, unless its upload sets another time.
        quota: The bytes that a tenant may keep.
    """

    def __init__(self, store: Store, storage: Storage, limit: int, days: float, quota: StorageQuota) -> None:
        self.store, self.storage, self.limit, self.days, self.quota = store, storage, limit, days, quota

    def key(self, upload: Upload) -> str:
        return f"files/{upload.id}"

    def source(self, upload: Upload, limits: TableLimits) -> FileSource:
        """The rows of an uploaded table."""
        return FileSource(
            repr(upload.name),
            upload.format,
            lambda: self.storage.reading(self.key(upload)),
            limits=limits,
        )

    def content(self, upload: Upload) -> bytes:
        with self.storage.reading(self.key(upload)) as source:
            return source.read()

    def save(self, tenant: str, name: str, purpose: str, source: BinaryIO, seconds: float | None = None) -> Upload:
        """Store a file.

        Args:
            seconds: The file is deleted after so long; None takes the `days` of all files.

        Raises:
            TooLargeError: The file has more bytes than the limit; nothing of it is kept.
            StorageFullError: It has more bytes than its tenant may keep; nothing of it is kept.
        """
        used, allowed = self.quota.state(tenant)
        with self.writing(tenant, name, purpose, seconds=seconds, is_result=False) as (sink, made):
            written = 0
            while chunk := source.read(CHUNK):
                end_if_abandoned()
                written += len(chunk)
                if written > self.limit:
                    raise TooLargeError(f"The file is larger than this service takes ({self.limit:,} bytes).")
                if used + written > allowed:
                    raise full(tenant, used, written, allowed)
                sink.write(chunk)
        return made[0]

    @contextmanager
    def writing(
        self,
        tenant: str,
        name: str,
        purpose: str,
        file_id: str | None = None,
        seconds: float | None = None,
        is_result: bool = True,
    ) -> Iterator[tuple[IO[bytes], list[Upload]]]:
        """A new file to write to. At its end the list has its `Upload`; after a failure nothing of the file is left.

        Args:
            is_result: It is kept even if it has more bytes than the tenant may keep.

        Raises:
            StorageFullError: It has more bytes than the tenant may keep.
        """
        file_id, now = file_id or f"file-{secrets.token_hex(12)}", self.store.now()
        expires = now + (self.days * DAY if seconds is None else seconds)
        made: list[Upload] = []
        with self.storage.writing(f"files/{file_id}") as sink:
            yield sink, made
            size = sink.tell()
        made.append(Upload(file_id, tenant, name[-255:], purpose, size, now, expires))
        try:
            with self.store.write() as connection:
                connection.execute(files.delete().where(files.c.id == file_id))
                connection.execute(files.insert().values(asdict(made[0])))
                if not is_result:
                    self.quota.refuse_excess(connection, tenant, size)
        except StorageFullError:
            self.storage.delete(f"files/{file_id}")
            raise

    def get(self, tenant: str, file_id: str) -> Upload:
        """The tenant's file of this id.

        Raises:
            NotFoundError: The tenant has no such file.
        """
        return self.chosen((files.c.tenant == tenant) & (files.c.id == file_id) & kept(self.store.now()), 1, file_id)[0]

    def newest(
        self, tenant: str, limit: int, after: str | None, which: FileFilter = EVERY_FILE, last_first: bool = True
    ) -> list[Upload]:
        """The tenant's files, newest first or oldest first; with `after`, only those that come after that file."""
        these = sa.and_(files.c.tenant == tenant, kept(self.store.now()), *which.conditions())
        if after is not None:
            last, place = self.get(tenant, after), sa.tuple_(files.c.created_at, files.c.id)
            end = sa.tuple_(last.created_at, last.id)
            these &= (place < end) if last_first else (place > end)
        return self.chosen(these, limit, last_first=last_first)

    def chosen(self, which: Any, limit: int, wanted: str | None = None, last_first: bool = True) -> list[Upload]:
        columns = [files.c[f.name] for f in fields(Upload)]
        order = [c.desc() if last_first else c.asc() for c in (files.c.created_at, files.c.id)]
        with self.store.read() as connection:
            rows = connection.execute(sa.select(*columns).where(which).order_by(*order).limit(limit))
            found = [Upload(*row) for row in rows]
        if wanted is not None and not found:
            raise NotFoundError(f"There is no file {wanted!r}.")
        return found

    def delete(self, upload: Upload) -> None:
        with self.store.write() as connection:
            connection.execute(files.delete().where(files.c.id == upload.id))
        self.storage.delete(self.key(upload))

    def expire(self) -> int:
        """Delete the files that have expired; returns their number."""
        late = self.chosen(~kept(self.store.now()), MOST_AT_ONCE)
        for upload in late:
            self.delete(upload)
        return len(late)


def kept(now: float) -> sa.ColumnElement[bool]:
    return files.c.expires_at.is_(None) | (files.c.expires_at > now)
