"""Jobs have a size, and tenants a quota of storage. Jobs of before count as empty until they are deleted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("tenants", sa.Column("storage_bytes", sa.BigInteger()))
