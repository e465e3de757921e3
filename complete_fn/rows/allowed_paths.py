"""A job names files and objects only under the roots that the operator allows, and nothing else on the network."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from complete_fn.errors import InputError, NotFoundError, StorageError
from complete_fn.rows.object_storage import Storage, guarded

NOT_ALLOWED = "{uri!r} is under no root that this service may {verb}. Its operator allows them by {setting}."
# Reasons why a file cannot be opened that are no fault of its name, and pass.
AWAY = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)
SETTINGS = {"read": "COMPLETE_FN_SOURCES", "write": "COMPLETE_FN_SINKS"}


@dataclass(frozen=True, slots=True)
class Allowed:
    """A file or object, as its root (a folder, or s3://bucket/prefix) and the path steps below the root."""

    root: str
    steps: tuple[str, ...]

    @property
    def local(self) -> bool:
        return "://" not in self.root

    @contextmanager
    def reading(self) -> Iterator[IO[bytes]]:
        """Raises:
        NotFoundError: There is no such file, or the path names a link, a pipe or a device, or leads through a link.
        """
        if not self.local:
            with Storage(self.root).reading("/".join(self.steps)) as source:
                yield source
            return
        with self.folder() as folder:
            try:
                # O_NONBLOCK: opening a pipe without a writer would wait for ever.
                opened = os.open(self.steps[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            except OSError as error:
                raise NotFoundError(f"There is no file {'/'.join(self.steps)!r} under this root.") from error
        with guarded(os.fdopen(opened, "rb", buffering=0), self.faults) as found:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise NotFoundError(f"There is no file {'/'.join(self.steps)!r} under this root.")
            yield found

    @contextmanager
    def writing(self) -> Iterator[IO[bytes]]:
        """A file that takes its place, over an older one, when the block ends without an error."""
        if not self.local:
            with Storage(self.root).writing("/".join(self.steps)) as sink:
                yield sink
            return
        name, beside = self.steps[-1], f".{secrets.token_hex(8)}.part"
        with self.folder(make=True) as folder:
            opened = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o640, dir_fd=folder)
            try:
                with guarded(os.fdopen(opened, "wb", buffering=0), self.faults) as sink:
                    yield sink
                os.replace(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(beside, dir_fd=folder)

    def refuse_unwritable(self) -> None:
        """Refuse a local file that cannot be written, by making its folder and a file beside it.

        Raises:
            InputError: The file or its folder cannot be written.
            StorageError: The root is away.
        """
        if not self.local:
            return
        with self.folder(make=True) as folder:
            with suppress(FileNotFoundError):
                if stat.S_ISDIR(os.stat(self.steps[-1], dir_fd=folder, follow_symlinks=False).st_mode):
                    raise InputError(f"{'/'.join(self.steps)!r} is a folder. Name a file.")
            beside = f".{secrets.token_hex(8)}.part"
            os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o640, dir_fd=folder))
            os.unlink(beside, dir_fd=folder)

    @contextmanager
    def folder(self, make: bool = False) -> Iterator[int]:
        """The folder of the last step. Each step is opened by itself, so that not even a new link leads elsewhere."""
        with self.faults():
            opened = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for step in self.steps[:-1]:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(step, 0o750, dir_fd=opened)
                inner = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened)
                os.close(opened)
                opened = inner
            yield opened
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"There is no file {'/'.join(self.steps)!r} under this root.") from error
        except OSError as error:
            if error.errno in AWAY:
                raise self.away(error) from error
            raise InputError(f"{'/'.join(self.steps)!r} cannot be used: {error.strerror}.") from error
        finally:
            os.close(opened)

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Raise failures of the root, and of the files once they are open, as the operator's."""
        try:
            yield
        except OSError as error:
            raise self.away(error) from error

    def away(self, error: OSError) -> StorageError:
        return StorageError(f"The root {self.root} cannot be used for {'/'.join(self.steps)!r}: {error.strerror}.")


def allowed(uri: str, roots: Sequence[str], tenant: str, verb: str) -> Allowed:
    """Args:
        roots: folders or s3:// prefixes; {tenant} in them stands for the tenant's name.
        verb: `read` or `write`, for the message.

    Raises:
        InputError: The URI is under none of the roots. The message does not list the roots.
    """
    refused = InputError(NOT_ALLOWED.format(uri=uri, verb=verb, setting=SETTINGS[verb]))
    wanted = steps_of(uri)
    if wanted is None:
        raise refused
    for root in roots:
        base = steps_of(root.replace("{tenant}", tenant).rstrip("/"))
        if base is not None and len(wanted) > len(base) and wanted[: len(base)] == base:
            return Allowed(joined(base), tuple(wanted[len(base) :]))
    raise refused


def steps_of(uri: str) -> list[str] | None:
    """["s3://bucket" or "/", step, ...]; None for a URI that could mean anything but a plain path.

    fsspec reads `::` as a chain of file systems and `*?[` as patterns. A library below may decode `%` or resolve `..`.
    """
    if any(c in uri for c in "\\*?[]{}#%@\0") or "::" in uri or not uri.isprintable() or len(uri) > 1024:
        return None
    scheme, found, path = uri.partition("://")
    if not found:
        scheme, path = "file", uri
    if scheme == "file" and path.startswith("/"):
        head, rest = "/", path[1:]
    elif scheme in ("s3", "gs"):
        bucket, _, rest = path.partition("/")
        head = f"{scheme}://{bucket}"
        if not bucket or ":" in bucket:
            return None
    else:
        return None
    steps = rest.split("/") if rest else []
    return None if any(s in ("", ".", "..") for s in steps) else [head, *steps]


def joined(steps: Sequence[str]) -> str:
    return str(PurePosixPath(*steps)) if steps[0] == "/" else "/".join(steps)
