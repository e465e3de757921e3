"""The core's types become rows of the store's tables, and rows become the core's types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from complete_fn.store.attempts import Attempt, StoredAnswer
from complete_fn.types import Completion, RowError, Usage

OF_ENGINE = ("idle", "aborted")  # price classes of device time that belongs to no row


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One line of the ledger.

    Attributes:
        cost_nano: the billed cost, in 1e-9 of the currency.
        saved_nano: what the tokens of a free line would have cost, in 1e-9 of the currency.
        device_us: device time of all tokens of a slice, in microseconds, on the slice's `input` line.
        saved_us: device time that a free line saved, in microseconds.
        engine: HOST/PID of an engine that meters its devices.
    """

    price_class: str
    rows: int
    tokens: int
    cost_nano: int = 0
    saved_nano: int = 0
    device_us: int = 0
    saved_us: int = 0
    engine: str | None = None


def money(nano_units: int) -> Decimal:
    return Decimal(nano_units).scaleb(-9)


def answer_row(attempt: Attempt, stored: StoredAnswer, now: float) -> dict[str, Any]:
    c = stored.completion
    return {
        "tenant": attempt.tenant,
        "key": stored.key,
        "job": stored.job,
        "attempt": attempt.id,
        "model": attempt.model,
        "text": c.text,
        "scores": None if c.scores is None else json.dumps(dict(c.scores), ensure_ascii=False),
        "finish_reason": c.finish_reason,
        "error_code": c.error.code if c.error else None,
        "error_message": c.error.message if c.error else None,
        "prompt_tokens": c.usage.prompt_tokens,
        "cached_tokens": c.usage.cached_tokens,
        "completion_tokens": c.usage.completion_tokens,
        "device_us": round(c.usage.device_seconds * 1e6),
        "bytes": 200 + len((c.text or "").encode()) + 24 * len(c.scores or ()),
        "created_at": now,
    }


def ledger_row(attempt: Attempt, line: LedgerLine, at: float) -> dict[str, Any]:
    of_engine = line.price_class in OF_ENGINE  # belongs to no attempt: the engine reports it to any attempt
    return {
        "at": at,
        "tenant": "-" if of_engine else attempt.tenant,
        "user": "-" if of_engine else attempt.user,
        "attempt": 0 if of_engine else attempt.id,
        "job": None if of_engine else job_of(attempt.job),
        "query_tag": None if of_engine else attempt.query_tag,
        "model": attempt.model,
        "price_class": line.price_class,
        "rows": line.rows,
        "tokens": line.tokens,
        "cost_nano": line.cost_nano,
        "saved_nano": line.saved_nano,
        "device_us": line.device_us,
        "saved_us": line.saved_us,
        "engine": line.engine,
        "currency": attempt.currency,
        "basis": attempt.basis,
    }


def job_of(name: str | None) -> str | None:
    """The job of a part with the name JOB/NUMBER; any other name stays as it is."""
    job, _, number = (name or "").rpartition("/")
    return job if job and number.isdigit() else name


def completion_of(row: Mapping[str, Any]) -> Completion:
    error = RowError(row["error_code"], row["error_message"] or "") if row["error_code"] else None
    return Completion(
        text=row["text"],
        finish_reason=row["finish_reason"],
        error=error,
        usage=Usage(row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"], row["device_us"] / 1e6),
        source="cache",
        scores=None if row["scores"] is None else json.loads(row["scores"]),
    )
