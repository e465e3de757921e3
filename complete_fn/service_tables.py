"""Tables of the service: API keys and tenants. Made beside the store's own tables, in the same state file."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, LargeBinary, String, Table

from complete_fn.tables import metadata

# A key is shown once, when it is made; what is kept is the SHA-256 of its secret half, which has 256 random bits.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("user", String(64), nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("scopes", String(255), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)

# `daily_nano`: what the tenant may spend in a UTC day, in 1e-9 of the currency; NULL sets no bound.
tenants = Table(
    "tenants",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("daily_nano", BigInteger),
)
