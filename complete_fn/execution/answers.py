"""The outcome of a run in the caller's row order."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Prices
from complete_fn.engines.prices import amount
from complete_fn.engines.tokenizer import token_sizes
from complete_fn.execution.run_state import known_answers
from complete_fn.execution.summary import Summary, summarise
from complete_fn.planning import make_plan
from complete_fn.planning.field_order import names_in_order
from complete_fn.planning.plan import BatchPlan
from complete_fn.prompts.options import CacheMode
from complete_fn.store.store import Store
from complete_fn.types import Asker, Completion, Usage

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
        """[n] DETAILS, NULL where the prompt was NULL.

        A row costs something only if this job computed it, in this attempt or an earlier one. Copies of another row and
        reused answers cost nothing.
        """
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
        """[m] names of the fields in the order in which the model saw them.

        None for a prompt without separate fields, and for a reused answer, because the store keeps no order.
        """
        pairs = zip(names_in_order(self.plan), self.completions, strict=True)
        return [order if c.source == "computed" else None for order, c in pairs]

    def is_copy(self) -> Any:
        """[n] whether the row is a duplicate, answered by the first row with the same prompt."""
        copy = np.zeros(len(self.plan.prompts), bool)
        copy[self.plan.order] = self.plan.first[self.plan.distinct] != self.plan.order
        return copy


def committed_answers(
    call: Call,
    prompts: object,
    store: Store,
    who: Asker,
    cache: CacheMode,
    missing: Completion,
    ended: bool = False,
) -> Answers:
    """The answers that a stopped run of these prompts has committed. The other rows get `missing`.

    Args:
        ended: The job `who.job` has ended.
    """
    plan = make_plan(prompts, mergeable=call.sampling.greedy, sizes=token_sizes(call.model))
    work = known_answers(call, plan, store, who, cache, ended)
    for number in work.missing():
        work.found[number] = missing
    return Answers(plan, work.completions, call.model.prices, summarise(call, work, 0.0))


def usage_row(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    }
