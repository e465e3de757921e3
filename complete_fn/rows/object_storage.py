"""`Storage` reads and writes objects under one URL: a local folder, s3:// or gs://. An object is whole or absent."""

from __future__ import annotations

import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit

from complete_fn.errors import CompleteError, EngineMissingError, InvalidOptionError, NotFoundError, StorageError

BLOCK = 8 * 1024 * 1024  # bytes read ahead from a remote object
REMOTE = {"s3": "s3fs", "gs": "gcsfs"}  # scheme -> the library that implements it for fsspec


class Storage:
    """A folder of objects by key ("jobs/job_1/part-00000.parquet").

    Credentials and endpoint come from the environment only (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_ENDPOINT_URL; GOOGLE_APPLICATION_CREDENTIALS), so that no URL and no record contains them.

    Raises:
        InvalidOptionError: The URL's scheme is unknown, or the URL contains credentials.
        EngineMissingError: The library for the URL's scheme is not installed.
        StorageError: The storage cannot be reached, read or written now. Files that it gives raise this error too.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.root = opened(url)
        self.local = not remote(url)
        if self.local:
            with self.named_errors(""):
                Path(self.root).mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key}"

    @contextmanager
    def reading(self, key: str) -> Iterator[IO[bytes]]:
        """The object as a seekable file.

        Raises:
            NotFoundError: There is no object with this key.
        """
        with self.named_errors(key):
            source = self.fs.open(self.path(key), "rb", **({} if self.local else {"block_size": BLOCK}))
        with guarded(source, lambda: self.named_errors(key)) as found:
            yield found

    @contextmanager
    def writing(self, key: str) -> Iterator[IO[bytes]]:
        """A file that becomes the object when the block ends without an error, and otherwise leaves no trace."""
        with self.beside(key) as (name, sink):
            yield sink
            sink.flush()
            with self.named_errors(key):
                if self.local:
                    os.replace(name, self.path(key))
                else:
                    self.fs.put_file(name, self.path(key))

    @contextmanager
    def beside(self, key: str) -> Iterator[tuple[str, IO[bytes]]]:
        """(name, file) of a temporary local file, which is deleted when the block ends."""
        place = Path(self.path(key)) if self.local else Path(tempfile.gettempdir()) / "object"
        with self.named_errors(key):
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            name = str(place.with_name(f".{place.name}.{secrets.token_hex(6)}.part"))
            opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with guarded(open(opened, "w+b", buffering=0), lambda: self.named_errors(key)) as sink:
                yield name, sink
        finally:
            with suppress(OSError):
                os.unlink(name)

    def copy(self, source: str, target: str) -> None:
        with self.reading(source) as old, self.writing(target) as new:
            shutil.copyfileobj(old, new, BLOCK)

    def exists(self, key: str) -> bool:
        with self.named_errors(key), suppress(FileNotFoundError):
            return bool(self.fs.info(self.path(key))["type"] == "file")  # `isfile` says no if the storage is away
        return False

    def keys(self, prefix: str = "") -> list[str]:
        """The keys under a folder, in order."""
        folder = self.path(prefix).rstrip("/")
        with self.named_errors(prefix):
            found = self.fs.find(folder) if self.fs.isdir(folder) else []
        return sorted(str(name)[len(self.root.rstrip("/")) + 1 :] for name in found)

    def delete(self, key: str) -> None:
        """Delete the object, if there is one."""
        with self.named_errors(key), suppress(FileNotFoundError):
            self.fs.rm_file(self.path(key))

    def delete_folder(self, key: str) -> None:
        folder = self.path(key)
        with self.named_errors(key), suppress(FileNotFoundError):
            if self.fs.isdir(folder):
                self.fs.rm(folder, recursive=True)

    def named_errors(self, key: str) -> AbstractContextManager[None]:
        return storage_faults(self.url, key)


@contextmanager
def storage_faults(where: str, key: str) -> Iterator[None]:
    """Raise a storage library's exceptions as our own. The libraries' messages contain no secrets, but paths."""
    try:
        yield
    except CompleteError:
        raise
    except FileNotFoundError as error:
        raise NotFoundError(f"The storage has no {key!r}.") from error
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise StorageError(f"The storage {where} cannot be used for {key!r}: {first}") from error


class GuardedFile(io.RawIOBase):
    """An object's file. Its own failures are ours by name, so that a reader of the file can tell them from damage."""

    def __init__(self, inner: Any, faults: Callable[[], AbstractContextManager[None]]) -> None:
        self.inner, self.faults = inner, faults

    def readable(self) -> bool:
        return bool(self.inner.readable())

    def writable(self) -> bool:
        return bool(self.inner.writable())

    def seekable(self) -> bool:
        return bool(self.inner.seekable())

    def fileno(self) -> int:
        return int(self.inner.fileno())

    def readinto(self, buffer: Any) -> int:
        with self.faults():
            return int(self.inner.readinto(buffer))

    def write(self, data: Any) -> int:
        with self.faults():
            return int(self.inner.write(data))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self.faults():
            return int(self.inner.seek(offset, whence))

    def tell(self) -> int:
        return int(self.inner.tell())

    def truncate(self, size: int | None = None) -> int:
        with self.faults():
            return int(self.inner.truncate(size))

    def close(self) -> None:
        if not self.closed:
            super().close()
            with self.faults():
                self.inner.close()


def guarded(inner: Any, faults: Callable[[], AbstractContextManager[None]]) -> IO[bytes]:
    """The file, buffered. Without a buffer of our own fsspec's files have no readline(limit)."""
    raw = GuardedFile(inner, faults)
    buffered: Any = io.BufferedWriter if raw.writable() else io.BufferedReader
    if raw.readable() and raw.writable():
        buffered = io.BufferedRandom
    return cast(IO[bytes], buffered(raw))


def remote(url: str) -> bool:
    return "://" in url and not url.startswith("file://")


def opened(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in the file system) of a URL.

    Raises:
        InvalidOptionError, EngineMissingError: see `Storage`.
    """
    import fsspec

    if not remote(url):
        return fsspec.filesystem("file"), os.path.abspath(url.removeprefix("file://"))
    parts = urlsplit(url)
    if parts.scheme not in REMOTE or not parts.hostname or "@" in parts.netloc or "::" in url:
        raise InvalidOptionError(
            f"{parts.scheme}:// cannot be used: name a local folder, s3://bucket/path or gs://bucket/path. "
            "Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)."
        )
    try:
        # No cache of listings: other workers write there too, so a listing may be outdated a moment later.
        files = fsspec.filesystem(parts.scheme, use_listings_cache=False, skip_instance_cache=False)
    except ImportError as error:
        library = REMOTE[parts.scheme]
        raise EngineMissingError(f"{library!r} is not installed. Bring it with: pip install {library}") from error
    return files, f"{parts.netloc}{parts.path}".rstrip("/")
