"""Table definitions of the store. Money is kept in nano-units (1e-9 of the currency) as whole numbers."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

# Answers by (tenant, key). Rows with `job` set are kept for the resume of that job only and go when it has ended.
answers = Table(
    "answers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("key", LargeBinary(32), nullable=False),
    Column("job", String(64)),
    Column("attempt", Integer),
    Column("model", String(255), nullable=False),
    Column("text", Text),
    Column("finish_reason", String(16)),
    Column("error_code", String(32)),
    Column("error_message", Text),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("tenant", "key"),
    Index("answers_job", "job"),
    Index("answers_age", "created_at"),
)

# One line per slice and price class: input, cached_input, output; duplicate, reused, resumed (free, `saved_nano`
# names what they saved); lost (work of a killed attempt, never billed).
ledger = Table(
    "ledger",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("user", String(64), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("query_tag", String(255)),
    Column("model", String(255), nullable=False),
    Column("price_class", String(16), nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("cost_nano", BigInteger, nullable=False),
    Column("saved_nano", BigInteger, nullable=False),
    Column("currency", String(8), nullable=False),
    Column("basis", String(8), nullable=False),
    Index("ledger_at", "at"),
)

# One row per execution of run(); reserved_* is the work admitted and not yet committed. `status`: running, then done,
# cancelled, failed or lost (killed); ended once the job it belongs to has.
attempts = Table(
    "attempts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("user", String(64), nullable=False),
    Column("job", String(64)),
    Column("query_tag", String(255)),
    Column("model", String(255), nullable=False),
    Column("status", String(16), nullable=False),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("pid_started", Float, nullable=False),
    Column("began", Float, nullable=False),
    Column("ended", Float),
    Column("reserved_rows", BigInteger, nullable=False),
    Column("reserved_tokens", BigInteger, nullable=False),
    Column("currency", String(8), nullable=False),
    Column("basis", String(8), nullable=False),
    Index("attempts_status", "status"),
    Index("attempts_job", "job"),
)

# When each kind of upkeep was last done.
upkeep = Table(
    "upkeep",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("at", Float, nullable=False),
)
