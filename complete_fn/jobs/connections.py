"""The operator registers the databases that a tenant's jobs may use. Their URLs stay in the environment."""

from __future__ import annotations

from dataclasses import dataclass, fields

import sqlalchemy as sa

from complete_fn.errors import InputError, InvalidOptionError, NotFoundError
from complete_fn.jobs.api_keys import NAME
from complete_fn.logs import logger
from complete_fn.rows.databases import RowDatabase, open_database
from complete_fn.rows.query_process import QueryProcess
from complete_fn.settings import secret
from complete_fn.store.job_tables import connections
from complete_fn.store.store import Store

LOG = logger("service")


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
        self.looked_at: set[tuple[str, str]] = set()  # connections whose role was looked at in this process

    def add(self, tenant: str, name: str, url_env: str, writable: bool) -> None:
        """Register a connection.

        Raises:
            InvalidOptionError: A name cannot be used, or the tenant has a connection of this name already.
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
            row = Connection(tenant, name, url_env, writable, self.store.now())
            connection.execute(connections.insert().values({f.name: getattr(row, f.name) for f in fields(row)}))

    def list(self) -> list[Connection]:
        with self.store.read() as connection:
            ordered = sa.select(*COLUMNS).order_by(connections.c.tenant, connections.c.name)
            return [Connection(*row) for row in connection.execute(ordered)]

    def remove(self, tenant: str, name: str) -> bool:
        with self.store.write() as connection:
            return connection.execute(connections.delete().where(chosen(tenant, name))).rowcount > 0

    def get(self, tenant: str, name: str, writable: bool = False) -> Connection:
        """The tenant's connection of this name.

        Raises:
            NotFoundError: The tenant has no connection of this name.
            InputError: `writable` is set, and jobs may not write there.
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

    def reader(self, found: Connection, seconds: float) -> QueryProcess:
        """A child process for one SELECT of the tenant, which may take `seconds`.

        Raises:
            InputError: The variable with the URL is not set where the service runs.
        """
        url = self.url(found)
        if (found.tenant, found.name) not in self.looked_at:
            self.looked_at.add((found.tenant, found.name))
            warn_of_powers(found, open_database(url, seconds=seconds))
        return QueryProcess(url, seconds)

    def writer(self, found: Connection, seconds: float) -> RowDatabase:
        """The database, to write answers to; each transaction may take `seconds`.

        Raises:
            InputError: The variable with the URL is not set where the service runs.
        """
        return open_database(self.url(found), seconds=seconds)

    def url(self, found: Connection) -> str:
        url = secret(found.url_env)
        if not url:
            raise InputError(f"Connection {found.name!r} has no URL where this service runs; its operator can set it.")
        return url


def warn_of_powers(found: Connection, database: RowDatabase) -> None:
    try:
        powers = database.powers()
    except InputError:  # the query that follows says why the database cannot be reached
        return
    finally:
        database.close()
    if powers:
        LOG.warning(
            "Connection %s of tenant %s: its role %s, and so could each SELECT of the tenant. Use a plain role.",
            *(found.name, found.tenant, ", ".join(powers)),
        )


def chosen(tenant: str, name: str) -> sa.ColumnElement[bool]:
    return (connections.c.tenant == tenant) & (connections.c.name == name)
