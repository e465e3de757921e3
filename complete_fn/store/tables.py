"""The store's tables. Money is in nano-units (1e-9 of the currency), as whole numbers."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Dialect,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
    case,
    cast,
    func,
)

metadata = MetaData()
Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows only in a column of type INTEGER
NUL, ESCAPE = "\x00", "\x1a"


class Words(TypeDecorator[str]):
    """Text of any length. PostgreSQL takes no NUL, so there an escape that ordinary text lacks stands for it."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "postgresql" or (NUL not in value and ESCAPE not in value):
            return value
        return value.replace(ESCAPE, ESCAPE + "1").replace(NUL, ESCAPE + "0")

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None or dialect.name != "postgresql" or ESCAPE not in value:
            return value
        return re.sub(f"{ESCAPE}([01])", lambda found: ESCAPE if found[1] == "1" else NUL, value)


# Answers by (tenant, key). Rows with a `job` are kept only for that job's resume, and deleted when the job ends.
answers = Table(
    "answers",
    metadata,
    Column("id", Number, primary_key=True),
    Column("tenant", Words(), nullable=False),
    Column("key", LargeBinary(), nullable=False),
    Column("job", Words()),
    Column("attempt", BigInteger),
    Column("model", Words(), nullable=False),
    Column("text", Words()),
    Column("scores", Words()),  # JSON object: label to probability or null
    Column("finish_reason", Words()),
    Column("error_code", Words()),
    Column("error_message", Words()),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("device_us", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("tenant", "key"),
    Index("answers_job", "job"),
    Index("answers_age", "created_at"),
)

# One line per slice and price class. Price classes:
# - Billed: input, cached_input, output.
# - Free; `saved_nano` is the list price and `saved_us` the device time (microseconds) that the line saved: duplicate,
#   reused, resumed (rows with a known answer), prefix_cache (cached tokens), swiftkv (layers that prompt tokens skip;
#   no list price).
# - lost: work that a stopped attempt admitted and did not commit, in estimated tokens.
# - idle, aborted: an engine's device time outside of steps, and in steps for rows that were given up. These lines
#   belong to no tenant, user or attempt ("-", "-", 0).
# `device_us` (microseconds times devices) of all tokens of a slice is on its `input` line. For each `engine`
# (HOST/PID), input + idle + aborted add up to the device time that the engine metered.
ledger = Table(
    "ledger",
    metadata,
    Column("id", Number, primary_key=True),
    Column("at", Float, nullable=False),
    Column("tenant", Words(), nullable=False),
    Column("user", Words(), nullable=False),
    Column("attempt", BigInteger, nullable=False),
    Column("job", Words()),
    Column("query_tag", Words()),
    Column("model", Words(), nullable=False),
    Column("price_class", Words(), nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("cost_nano", BigInteger, nullable=False),
    Column("saved_nano", BigInteger, nullable=False),
    Column("device_us", BigInteger, nullable=False),
    Column("saved_us", BigInteger, nullable=False),
    Column("engine", Words()),
    Column("currency", Words(), nullable=False),
    Column("basis", Words(), nullable=False),
    Index("ledger_at", "at"),
    Index("ledger_tenant", "tenant", "at"),
    Index("ledger_attempt", "attempt"),
)

# The sums of the ledger's lines by hour: `hour` is its first second. Every line is added in the transaction that writes
# it, and `COMPLETE_FN_LEDGER_DAYS` deletes only lines, so these sums are complete. `key`: a hash of `hour` and the
# columns up to `basis`, because a unique index takes no NULL as equal to another.
ledger_hours = Table(
    "ledger_hours",
    metadata,
    Column("key", LargeBinary(), primary_key=True),
    Column("hour", BigInteger, nullable=False),
    Column("tenant", Words(), nullable=False),
    Column("user", Words(), nullable=False),
    Column("job", Words()),
    Column("query_tag", Words()),
    Column("model", Words(), nullable=False),
    Column("price_class", Words(), nullable=False),
    Column("engine", Words()),
    Column("currency", Words(), nullable=False),
    Column("basis", Words(), nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("cost_nano", BigInteger, nullable=False),
    Column("saved_nano", BigInteger, nullable=False),
    Column("device_us", BigInteger, nullable=False),
    Column("saved_us", BigInteger, nullable=False),
    Index("ledger_hours_hour", "hour"),
    Index("ledger_hours_tenant", "tenant", "hour"),
    Index("ledger_hours_job", "job"),
)

# One row per execution of run(). `reserved_*`: work admitted and not yet committed. `step`: the number of the last
# change. `seen_at`: when the process last reported that it lives. `status`: running, then done, cancelled, failed or
# lost (killed); ended once its job has ended.
attempts = Table(
    "attempts",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("tenant", Words(), nullable=False),
    Column("user", Words(), nullable=False),
    Column("job", Words()),
    Column("query_tag", Words()),
    Column("model", Words(), nullable=False),
    Column("status", Words(), nullable=False),
    Column("host", Words(), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("pid_started", Float, nullable=False),
    Column("began", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("ended", Float),
    Column("step", BigInteger, nullable=False),
    Column("reserved_rows", BigInteger, nullable=False, default=0),
    Column("reserved_tokens", BigInteger, nullable=False, default=0),
    Column("currency", Words(), nullable=False),
    Column("basis", Words(), nullable=False),
    Index("attempts_status", "status"),
    Index("attempts_job", "job"),
)

# Caps on a tenant's spending, in 1e-9 of the currency. `name`: "day:2026-01-31:USD" (UTC) or "job:ID". `spent_nano` and
# `reserved_nano` together never exceed `limit_nano`; `reserved_nano` is the sum of the cap's reservations.
budgets = Table(
    "budgets",
    metadata,
    Column("tenant", Words(), primary_key=True),
    Column("name", Words(), primary_key=True),
    Column("limit_nano", BigInteger, nullable=False),
    Column("spent_nano", BigInteger, nullable=False),
    Column("reserved_nano", BigInteger, nullable=False),
)

# Money that a running attempt has drawn from a cap and not yet spent.
reservations = Table(
    "reservations",
    metadata,
    Column("attempt", BigInteger, primary_key=True, autoincrement=False),
    Column("name", Words(), primary_key=True),
    Column("nano", BigInteger, nullable=False),
)

# Reusable answers that a running attempt is computing, so that no other attempt computes them at the same time.
claims = Table(
    "claims",
    metadata,
    Column("tenant", Words(), primary_key=True),
    Column("key", LargeBinary(), primary_key=True),
    Column("attempt", BigInteger, nullable=False),
    Index("claims_attempt", "attempt"),
)

# Measurements of past runs, for estimates. `squares`: the sum of the squared lengths of answers. `seconds`: without
# the engine's start.
runs = Table(
    "runs",
    metadata,
    Column("id", Number, primary_key=True),
    Column("at", Float, nullable=False),
    Column("tenant", Words(), nullable=False),
    Column("model", Words(), nullable=False),
    Column("device", Words(), nullable=False),
    Column("kind", LargeBinary(), nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("squares", Float, nullable=False),
    Column("device_seconds", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("steady_rows", BigInteger, nullable=False),
    Column("steady_prompt_tokens", BigInteger, nullable=False),
    Column("steady_cached_tokens", BigInteger, nullable=False),
    Column("steady_completion_tokens", BigInteger, nullable=False),
    Column("steady_device_seconds", Float, nullable=False),
    Index("runs_model", "model"),
)

# The time of the last upkeep of each kind.
upkeep = Table(
    "upkeep",
    metadata,
    Column("name", Words(), primary_key=True),
    Column("at", Float, nullable=False),
)


def summed(column: ColumnElement[Any]) -> ColumnElement[int]:
    """The sum of an integer column, 0 without rows. The cast is for PostgreSQL, whose sums are NUMERIC, so Decimals."""
    return cast(func.coalesce(func.sum(column), 0), BigInteger)


def of_class(column: Any, *price_classes: str) -> ColumnElement[int]:
    """The sum of a column of the ledger, or of a selection from it, over its lines of these price classes."""
    return summed(case((column.table.c.price_class.in_(price_classes), column), else_=0))
