"""Tables of the service, in the same state file as the store's own: API keys, tenants, files, jobs and parts."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Index, Integer, LargeBinary, String, Table, Text, UniqueConstraint

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

# What was uploaded, and what batches left to be fetched. The bytes are in the service's folder, under the id.
files = Table(
    "files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("name", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Index("files_tenant", "tenant", "created_at"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("user", String(64), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("status", String(16), nullable=False),
    Column("ends_as", String(16)),
    Column("model", String(255), nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("nulls", BigInteger, nullable=False),
    Column("max_cost_nano", BigInteger),
    Column("currency", String(8), nullable=False),
    Column("basis", String(8), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("idempotency_key", String(255)),
    Column("request", Text, nullable=False),
    Column("query_tag", String(255)),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("deadline", Float),
    Column("error", Text),
    UniqueConstraint("tenant", "idempotency_key"),
    Index("jobs_tenant", "tenant", "created_at"),
    Index("jobs_status", "status"),
)

# `fence` goes up with every claim: a commit names the one it holds, so that a worker whose lease ran out commits
# nothing. `claimed_at` tells which tenant was served last.
parts = Table(
    "parts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job", String(40), nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("status", String(16), nullable=False),
    Column("model", String(255), nullable=False),
    Column("options", Text, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("fence", Integer, nullable=False, default=0),
    Column("worker", String(255)),
    Column("lease_until", Float, nullable=False, default=0.0),
    Column("not_before", Float, nullable=False, default=0.0),
    Column("claimed_at", Float),
    Column("tries", Integer, nullable=False, default=0),
    Column("result", String(64)),
    Column("failed", BigInteger, nullable=False, default=0),
    UniqueConstraint("job", "number"),
    Index("parts_status", "status"),
    Index("parts_served", "tenant", "claimed_at"),
)

TABLES = [api_keys, tenants, files, jobs, parts]
