"""Databases that a tenant's jobs may use, registered by the operator; their URLs are in the environment only."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

import sqlalchemy as sa

from complete_fn.errors import InputError, InvalidOptionError, NotFoundError
from complete_fn.jobs.api_keys import NAME
from complete_fn.rows.databases import RowDatabase, open_database
from complete_fn.settings import secret
from complete_fn.store.job_tables import connections
from complete_fn.store.store import Store


@dataclass(frozen=True, slots=True)
class Connection:
    """`url_env` names the variable that has the URL; `writable` says whether jobs may write answers there."""

    tenant: str
    name: str
    url_env: str
    writable: bool
    created_at: float


COLUMNS = [connections.c[f.name] for f in fields(Connection)]


class Connections:
    """The connections of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def add(self, tenant: str, name: str, url_env: str, writable: bool) -> None:
        """Raises:
        InvalidOptionError: a name that cannot be used, or one that is taken.
        """
        for what, text in (("tenant", tenant), ("connection", name)):
            if not NAME.fullmatch(text):
                raise InvalidOptionError(f"{text!r} is no name of a {what}: take letters, digits, '.', '_' and '-'.")
        if not url_env.isidentifier():
            raise InvalidOptionError(
                f"--url-env {url_env[:40]!r} is no name of a variable. The URL itself is never kept."
            )
        with self.store.write() as connection:
            if connection.execute(sa.select(*COLUMNS).where(chosen(tenant, name))).first() is not None:
                raise InvalidOptionError(f"Tenant {tenant} has a connection {name!r} already. Remove it first.")
            row = Connection(tenant, name, url_env, writable, time.time())
            connection.execute(connections.insert().values({f.name: getattr(row, f.name) for f in fields(row)}))

    def list(self) -> list[Connection]:
        with self.store.read() as connection:
            ordered = sa.select(*COLUMNS).order_by(connections.c.tenant, connections.c.name)
            return [Connection(*row) for row in connection.execute(ordered)]

    def remove(self, tenant: str, name: str) -> bool:
        with self.store.write() as connection:
            return connection.execute(connections.delete().where(chosen(tenant, name))).rowcount > 0

    def get(self, tenant: str, name: str, writable: bool = False) -> Connection:
        """Raises:
        NotFoundError: the tenant has none of this name.
        InputError: jobs may not write there.
        """
        with self.store.read() as connection:
            row = connection.execute(sa.select(*COLUMNS).where(chosen(tenant, name))).first()
        if row is None:
            raise NotFoundError(
                f"There is no connection {name!r}. Its operator makes one: `complete-fn connections add`."
            )
        found = Connection(*row)
        if writable and not found.writable:
            raise InputError(f"Connection {name!r} is for reading. Its operator allows more with --writable.")
        return found

    def open(self, found: Connection, read_only: bool, seconds: float) -> RowDatabase:
        """Raises:
        InputError: the variable is not set where the service runs.
        """
        url = secret(found.url_env)
        if not url:
            raise InputError(f"Connection {found.name!r} has no URL where this service runs; its operator can set it.")
        return open_database(url, read_only=read_only, seconds=seconds)


def chosen(tenant: str, name: str) -> sa.ColumnElement[bool]:
    return (connections.c.tenant == tenant) & (connections.c.name == name)
