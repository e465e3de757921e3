"""What Alembic runs for each of its commands: the migrations, on the connection that `schema.migrate` gives."""

from __future__ import annotations

from alembic import context

from complete_fn.store import job_tables  # noqa: F401  its tables belong to the metadata
from complete_fn.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, compare_type=True)
context.run_migrations()
