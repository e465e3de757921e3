"""`BACKENDS` lists the databases that can hold a store. `StoreBackend` is the protocol that each implements."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from complete_fn.errors import StoreError
from complete_fn.ports import PORTS, is_port
from complete_fn.registry import Table, resolve
from complete_fn.store.clock import StoreClock

URLS = "It must be the path of a file or postgresql://USER:PASSWORD@HOST:PORT/DATABASE."


class StoreBackend(Protocol):
    """A database that holds a store. `place` names it in messages, without a password; `clock` tells its time."""

    place: str
    engine: sa.Engine
    clock: StoreClock

    @property
    def writing(self) -> AbstractContextManager[Any]:
        """A lock that this process holds while it writes."""
        ...

    def fault(self, error: Exception) -> StoreError: ...

    def lock_schema(self, connection: sa.Connection) -> None:
        """Keep other processes from changing the schema until the transaction ends."""
        ...

    def used_bytes(self, connection: sa.Connection) -> int: ...

    def give_back(self, connection: sa.Connection) -> bool:
        """Return some of the empty space to the file system. Returns whether there may be more."""
        ...

    def after_fork(self) -> None: ...


# By the name in a database URL. Each entry is called as backend(url: sqlalchemy.URL) -> StoreBackend.
BACKENDS: Table[str] = Table("store backend")
BACKENDS.add("sqlite", "complete_fn.store.sqlite_backend:open_sqlite")
BACKENDS.add("postgresql", "complete_fn.store.postgres_backend:PostgresBackend")
BACKENDS.add("postgres", "complete_fn.store.postgres_backend:PostgresBackend")


def open_database(url_or_path: str | Path) -> StoreBackend:
    """Raises:
    StoreError: The text names neither a file nor a supported database.
    """
    if isinstance(url_or_path, Path) or "://" not in url_or_path:
        url = sa.URL.create("sqlite", database=str(url_or_path))
    else:
        try:
            url = sa.make_url(url_or_path)
        except (ArgumentError, ValueError) as error:
            raise StoreError(f"The database URL cannot be read. {URLS}") from error
    kind = url.get_backend_name()
    if kind not in BACKENDS or (kind == "sqlite" and not url.database):
        raise StoreError(f"The database {masked(url)} cannot be used. {URLS}")
    if not is_port(url.port):
        raise StoreError(f"The database {masked(url)} cannot be reached: {PORTS}.")
    try:
        found: StoreBackend = resolve(BACKENDS[kind])(url)
    except (ArgumentError, NoSuchModuleError, TypeError) as error:
        raise StoreError(f"The database {masked(url)} cannot be used. {URLS}") from error
    return found


def masked(url: sa.URL) -> str:
    """The URL without its password, even if the password is a query parameter."""
    secret = {name: "..." for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(secret).render_as_string(hide_password=True)


def cause(error: Exception) -> str:
    return str(error.orig if isinstance(error, DBAPIError) else error)
