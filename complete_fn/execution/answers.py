"""The outcome of a run in the caller's row order, and its one-line summary."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.engines.catalogue import Prices
from complete_fn.engines.prices import amount, at_prices
from complete_fn.planning.field_order import names_in_order
from complete_fn.planning.plan import BatchPlan
from complete_fn.types import Completion, Usage

USAGE = pa.struct([("prompt_tokens", pa.int64()), ("cached_tokens", pa.int64()), ("completion_tokens", pa.int64())])
ERROR = pa.struct([("code", pa.string()), ("message", pa.string())])
SCORES = pa.map_(pa.string(), pa.float64())
FIELD_ORDER = pa.list_(pa.string())
DETAILS = pa.struct(
    [
        ("value", pa.large_string()),
        ("error", ERROR),
        ("finish_reason", pa.string()),
        ("usage", USAGE),
        ("cost", pa.decimal128(18, 9)),
        ("source", pa.string()),
        ("scores", SCORES),
        ("field_order", FIELD_ORDER),
    ]
)


@dataclass(frozen=True)
class Summary:
    """Counts of one or several runs. `usage` and `cost` are what was billed; `saved` what free rows would have cost.

    `reordered` rows had their fields in another order than the template; `reused` rows had stored answers; `resumed`
    rows were done by an earlier attempt of the same job.
    """

    rows: int = 0
    nulls: int = 0
    distinct: int = 0
    computed: int = 0
    reused: int = 0
    resumed: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    usage: Usage = Usage()
    cost: Decimal = Decimal(0)
    saved: Decimal = Decimal(0)
    currency: str = "USD"
    basis: str = "example"
    seconds: float = 0.0
    reordered: int = 0

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.rows + other.rows,
            self.nulls + other.nulls,
            self.distinct + other.distinct,
            self.computed + other.computed,
            self.reused + other.reused,
            self.resumed + other.resumed,
            self.failed + other.failed,
            self.usage + other.usage,
            self.cost + other.cost,
            self.saved + other.saved,
            other.currency,
            other.basis,
            self.seconds + other.seconds,
            self.reordered + other.reordered,
        )

    def line(self) -> str:
        """The summary as one line for a person."""
        u = self.usage
        share = f" ({u.cached_tokens / u.prompt_tokens:.0%} cached)" if u.prompt_tokens else ""
        parts = [
            f"{self.rows:,} rows",
            f"{self.distinct:,} distinct",
            *([f"{self.reused:,} known"] if self.reused else []),
            *([f"{self.resumed:,} resumed"] if self.resumed else []),
            *([f"{self.reordered:,} with their fields reordered"] if self.reordered else []),
            f"{u.prompt_tokens:,} tokens in{share}",
            f"{u.completion_tokens:,} out",
            f"{self.currency} {self.cost:.6f} {at_prices(self.basis)} (saved {self.saved:.6f})",
            f"{self.seconds:.1f} s",
        ]
        if self.failed:
            parts.append(f"{self.failed.total():,} failed: " + ", ".join(f"{n} {c}" for c, n in self.failed.items()))
        return " · ".join(parts)


@dataclass(frozen=True)
class Answers:
    """n answers for n prompts. `completions` has one entry per distinct prompt of `plan`."""

    plan: BatchPlan
    completions: list[Completion]
    prices: Prices
    summary: Summary

    @cached_property
    def text(self) -> pa.ChunkedArray | pa.Array:
        """[n] large_string: the answer, NULL where the prompt was NULL or the row failed."""
        values = [c.text if c.error is None else None for c in self.completions]
        return self.plan.scatter(pa.array(values, pa.large_string()))

    @cached_property
    def details(self) -> pa.Array:
        """[n] DETAILS, NULL where the prompt was NULL. Rows that were not computed for themselves, by this
        attempt of the job or an earlier one, cost nothing."""
        c = self.completions
        names = DETAILS.names
        columns = {
            "value": pa.array([x.text for x in c], pa.large_string()),
            "error": pa.array([x.error and {"code": x.error.code, "message": x.error.message} for x in c], ERROR),
            "finish_reason": pa.array([x.finish_reason for x in c], pa.string()),
            "usage": pa.array([usage_row(x.usage) for x in c], USAGE),
            "cost": pa.array(
                [amount(self.prices, x.usage) if x.source == "computed" else Decimal(0) for x in c],
                pa.decimal128(18, 9),
            ),
            "source": pa.array([x.source for x in c], pa.string()),
            "scores": pa.array([x.scores and list(x.scores.items()) for x in c], SCORES),
            "field_order": pa.array(self.field_orders(), FIELD_ORDER),
        }
        of_row = {n: self.plan.scatter(columns[n]) for n in names}
        copy = pa.array(self.is_copy())
        of_row["cost"] = pc.if_else(copy, pa.scalar(Decimal(0), pa.decimal128(18, 9)), of_row["cost"])
        computed = pc.equal(of_row["source"], "computed")
        of_row["source"] = pc.if_else(pc.and_(copy, computed), "duplicate", of_row["source"])
        asked = pa.array(self.plan.rows_of_distinct() < 0)
        return pa.StructArray.from_arrays([of_row[n] for n in names], fields=list(DETAILS), mask=asked)

    def field_orders(self) -> list[list[str] | None]:
        """[m] names of the fields in the order in which the model saw them; None of prompts without fields apart, and
        of answers that were known, as no order is kept with them."""
        pairs = zip(names_in_order(self.plan), self.completions, strict=True)
        return [order if c.source == "computed" else None for order, c in pairs]

    def is_copy(self) -> Any:
        """[n] whether another row stands for this one."""
        copy = np.zeros(len(self.plan.prompts), bool)
        copy[self.plan.order] = self.plan.first[self.plan.distinct] != self.plan.order
        return copy


def usage_row(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    }
