"""Alembic's migrations of the store. `schema.migrate` runs them; a test holds them against `tables.metadata`."""
