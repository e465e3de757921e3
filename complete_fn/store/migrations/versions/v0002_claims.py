"""Claims of parts and deliveries have names, in place of numbers. Daily budgets are by currency."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("parts", sa.Column("claim", sa.String()))
    op.add_column("deliveries", sa.Column("claim", sa.String()))
    op.execute("UPDATE parts SET claim = 'before' WHERE fence > 0")
    op.drop_column("parts", "fence")
    op.drop_column("deliveries", "fence")
    op.create_table(
        "daily_budgets",
        sa.Column("tenant", sa.String(), primary_key=True),
        sa.Column("currency", sa.String(), primary_key=True),
        sa.Column("nano", sa.BigInteger(), nullable=False),
    )
    op.execute("INSERT INTO daily_budgets SELECT name, 'USD', daily_nano FROM tenants WHERE daily_nano IS NOT NULL")
    op.drop_column("tenants", "daily_nano")
    op.execute(r"UPDATE budgets SET name = name || '\:USD' WHERE name LIKE 'day\:%'")  # a bare colon begins a parameter
