"""The ledger's sums by hour, from the lines that are there. Parts have an index by the time of their last claim."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

HOUR = 3600
GROUPED = ("tenant", "user", "job", "query_tag", "model", "price_class", "engine", "currency", "basis")
SUMMED = ("rows", "tokens", "cost_nano", "saved_nano", "device_us", "saved_us")


def upgrade() -> None:
    op.create_table(
        "ledger_hours",
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("user", sa.String(), nullable=False),
        sa.Column("job", sa.String(), nullable=True),
        sa.Column("query_tag", sa.String(), nullable=True),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("price_class", sa.String(), nullable=False),
        sa.Column("engine", sa.String(), nullable=True),
        sa.Column("currency", sa.String(), nullable=False),
        sa.Column("basis", sa.String(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost_nano", sa.BigInteger(), nullable=False),
        sa.Column("saved_nano", sa.BigInteger(), nullable=False),
        sa.Column("device_us", sa.BigInteger(), nullable=False),
        sa.Column("saved_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_index("ledger_hours_hour", "ledger_hours", ["hour"], unique=False)
    op.create_index("ledger_hours_job", "ledger_hours", ["job"], unique=False)
    op.create_index("ledger_hours_tenant", "ledger_hours", ["tenant", "hour"], unique=False)
    op.create_index("parts_claimed", "parts", ["claimed_at"], unique=False)
    fill_hours(op.get_bind())


def fill_hours(connection: sa.Connection) -> None:
    """Add up the ledger, one hour at a time, because a long ledger fits into no memory."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("LOCK TABLE ledger IN SHARE MODE")  # no line may be written that is not added
    ledger = sa.table("ledger", *(sa.column(name) for name in ("at", *GROUPED, *SUMMED)))
    hours = sa.table("ledger_hours", *(sa.column(name) for name in ("key", "hour", *GROUPED, *SUMMED)))
    columns = [ledger.c[name] for name in GROUPED]
    sums = [sa.cast(sa.func.sum(ledger.c[name]), sa.BigInteger).label(name) for name in SUMMED]
    by_group = sa.select(*columns, *sums).group_by(*columns)
    first = connection.execute(sa.select(sa.func.min(ledger.c.at))).scalar()
    while first is not None:
        hour = int(first // HOUR) * HOUR
        of_hour = by_group.where(ledger.c.at >= hour, ledger.c.at < hour + HOUR)
        rows = [{"key": key_of(hour, row), "hour": hour, **row} for row in connection.execute(of_hour).mappings()]
        connection.execute(hours.insert(), rows)
        first = connection.execute(sa.select(sa.func.min(ledger.c.at)).where(ledger.c.at >= hour + HOUR)).scalar()


def key_of(hour: int, row: Any) -> bytes:
    group = (hour, *(row[name] for name in GROUPED))
    return hashlib.blake2b(json.dumps(group).encode(), digest_size=16).digest()
