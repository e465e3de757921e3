"""The service's tables lie in the store beside the answers: API keys, tenants, files, jobs, parts, workers."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, LargeBinary, Table, UniqueConstraint

from complete_fn.store.tables import Number, Words, metadata

# An API key is shown once, when it is made. The table has only the SHA-256 of its secret half of 256 random bits.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Words(), primary_key=True),
    Column("tenant", Words(), nullable=False),
    Column("user", Words(), nullable=False),
    Column("digest", LargeBinary(), nullable=False),
    Column("scopes", Words(), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("expires_at", Float),
    Column("tokens_per_minute", BigInteger),
)

# `weight`: the tenant's share of the workers relative to other tenants (default 1). `storage_bytes`: what the tenant
# may keep; NULL for the usual number.
tenants = Table(
    "tenants",
    metadata,
    Column("name", Words(), primary_key=True),
    Column("weight", Float),
    Column("tokens_per_minute", BigInteger),
    Column("storage_bytes", BigInteger),
)

# The most money that a tenant may spend in a day (UTC), in 1e-9 of the currency.
daily_budgets = Table(
    "daily_budgets",
    metadata,
    Column("tenant", Words(), primary_key=True),
    Column("currency", Words(), primary_key=True),
    Column("nano", BigInteger, nullable=False),
)

# Tokens that a `tenant` or a `key` (`kind`) has used of its tokens per minute, at time `at`; the number drains.
token_buckets = Table(
    "token_buckets",
    metadata,
    Column("kind", Words(), primary_key=True),
    Column("name", Words(), primary_key=True),
    Column("used", Float, nullable=False),
    Column("at", Float, nullable=False),
)

# Uploaded files, and result files of batches. Their bytes are in the service's storage, under the id.
files = Table(
    "files",
    metadata,
    Column("id", Words(), primary_key=True),
    Column("tenant", Words(), nullable=False),
    Column("name", Words(), nullable=False),
    Column("purpose", Words(), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Index("files_tenant", "tenant", "created_at"),
    Index("files_expiry", "expires_at"),
)

# Databases that a tenant's jobs may use. `url_env` names the environment variable of the service that has the URL.
connections = Table(
    "connections",
    metadata,
    Column("tenant", Words(), primary_key=True),
    Column("name", Words(), primary_key=True),
    Column("url_env", Words(), nullable=False),
    Column("writable", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
)

# Results of jobs on their way to the job's sink. `status`: waiting, writing, written or failed. `claim`: as a part's.
deliveries = Table(
    "deliveries",
    metadata,
    Column("job", Words(), primary_key=True),
    Column("tenant", Words(), nullable=False),
    Column("status", Words(), nullable=False),
    Column("rows", BigInteger, nullable=False, default=0),
    Column("error", Words()),
    Column("claim", Words()),
    Column("tries", Integer, nullable=False, default=0),
    Column("lease_until", Float, nullable=False, default=0.0),
    Index("deliveries_status", "status"),
)

# `bytes`: what the job has in the service's storage: its rows, its prompts, and the results of its parts.
jobs = Table(
    "jobs",
    metadata,
    Column("id", Words(), primary_key=True),
    Column("tenant", Words(), nullable=False),
    Column("user", Words(), nullable=False),
    Column("kind", Words(), nullable=False),
    Column("status", Words(), nullable=False),
    Column("ends_as", Words()),
    Column("model", Words(), nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("nulls", BigInteger, nullable=False),
    Column("max_cost_nano", BigInteger),
    Column("currency", Words(), nullable=False),
    Column("basis", Words(), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("idempotency_key", Words()),
    Column("request", Words(), nullable=False),
    Column("query_tag", Words()),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("deadline", Float),
    Column("error", Words()),
    Column("bytes", BigInteger, nullable=False, default=0),
    UniqueConstraint("tenant", "idempotency_key"),
    Index("jobs_tenant", "tenant", "created_at"),
    Index("jobs_status", "status"),
)

# `claim` is the random name of the last claim. A commit names its claim, so that a worker whose lease was taken over
# can commit nothing. `claimed_at` and `tokens` tell how much each tenant was served.
parts = Table(
    "parts",
    metadata,
    Column("id", Number, primary_key=True),
    Column("job", Words(), nullable=False),
    Column("tenant", Words(), nullable=False),
    Column("number", Integer, nullable=False),
    Column("status", Words(), nullable=False),
    Column("model", Words(), nullable=False),
    Column("options", Words(), nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("shared", BigInteger, nullable=False, default=0),
    Column("claim", Words()),
    Column("worker", Words()),
    Column("claimant", Words()),
    Column("lease_until", Float, nullable=False, default=0.0),
    Column("not_before", Float, nullable=False, default=0.0),
    Column("claimed_at", Float),
    Column("tries", Integer, nullable=False, default=0),
    Column("result", Words()),
    Column("failed", BigInteger, nullable=False, default=0),
    UniqueConstraint("job", "number"),
    Index("parts_status", "status"),
    Index("parts_served", "tenant", "claimed_at"),
    Index("parts_claimed", "claimed_at"),
)

# Heartbeats of worker processes. `models`: JSON, see `worker_store.ModelState`. `busy_at`: when it last had work.
workers = Table(
    "workers",
    metadata,
    Column("id", Words(), primary_key=True),
    Column("host", Words(), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("address", Words()),
    Column("began", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("busy_at", Float, nullable=False),
    Column("draining", Boolean, nullable=False),
    Column("in_flight", Integer, nullable=False),
    Column("models", Words(), nullable=False),
)

# How fast a worker answers a model, as last measured. The rows outlive the workers, because estimates need them.
paces = Table(
    "paces",
    metadata,
    Column("model", Words(), primary_key=True),
    Column("tokens_per_second", Float),
    Column("cold_seconds", Float),
    Column("at", Float, nullable=False),
)

# Batches of warehouses, by the warehouse's own name for the batch. `asked`: the request, deleted once there is a
# `reply`. `holder`: the process that runs the batch. `digest`: of the request's body. `error`: why there is no reply.
call_outs = Table(
    "call_outs",
    metadata,
    Column("tenant", Words(), primary_key=True),
    Column("dialect", Words(), primary_key=True),
    Column("batch", Words(), primary_key=True),
    Column("digest", LargeBinary(), nullable=False),
    Column("status", Words(), nullable=False),
    Column("holder", Words(), nullable=False),
    Column("asked", LargeBinary()),
    Column("reply", LargeBinary()),
    Column("error", Words()),
    Column("created_at", Float, nullable=False),
    Index("call_outs_age", "created_at"),
)
