"""Opening a store creates its schema or upgrades it, by the migrations in the wheel. A schema is never downgraded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from complete_fn.errors import StoreError
from complete_fn.store.backends import StoreBackend

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0005"  # the newest version in migrations/versions; a store that has it needs no import of Alembic
NEWER = (
    "The store {place} has schema {found}, and this complete-fn knows only up to {head}. "
    "Update complete-fn, or name another store."
)
UNVERSIONED = (
    "The store {place} was made by a complete-fn before the first release. Move it away: the next run begins a new one."
)


def is_current(connection: sa.Connection) -> bool:
    return version_of(connection) == HEAD


def version_of(connection: sa.Connection) -> str | None:
    """The version of the store's schema; None if it has no schema yet."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return noted_version(connection)


def noted_version(connection: sa.Connection) -> str | None:
    """The version of a store that has a schema."""
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def migrate(connection: sa.Connection, database: StoreBackend) -> None:
    """Bring the schema to HEAD within the connection's transaction. A lock admits one process at a time.

    Raises:
        StoreError: The store's schema is newer than this code, or older than the first release.
    """
    database.lock_schema(connection)
    found = version_of(connection)
    if found == HEAD:
        return
    if found is None and sa.inspect(connection).has_table("answers"):
        raise StoreError(UNVERSIONED.format(place=database.place))
    from alembic import command
    from alembic.script import ScriptDirectory

    config = configuration(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise StoreError(NEWER.format(place=database.place, found=found, head=HEAD))
    command.upgrade(config, "head")


def configuration(connection: sa.Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "complete_fn.store:migrations")
    config.attributes["connection"] = connection
    return config
