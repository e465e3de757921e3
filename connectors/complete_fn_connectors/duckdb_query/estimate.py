"""What `sql` would take for a query: tokens, price and device-seconds, before anything is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any

import duckdb

from complete_fn.errors import CompleteError
from complete_fn.estimates.estimate import Estimate
from complete_fn.estimates.estimate_report import report
from complete_fn_connectors.duckdb_query.collect import Asked, Functions, Memory, choose_prompts, texts_column
from complete_fn_connectors.duckdb_query.constants import OpenConstants
from complete_fn_connectors.duckdb_query.explain import draw_boxes, is_ready, look_up, look_up_round
from complete_fn_connectors.duckdb_query.planner import collecting, plan_query, run_round, why_plainly
from complete_fn_connectors.duckdb_query.syntax_tree import Parameters, RunsPlainly, read_statement


@dataclass
class QueryEstimate:
    """The estimate of a query. It is printed as boxes: one for each model and set of options, one for what stays open.

    Attributes:
        parts: What is certain to be asked; below a LIMIT that stops early, the most that may be asked.
        open: The texts of calls that run plainly, or whose prompts depend on answers that are not known yet.
        plainly: why the query is not planned at all, so that nothing is known before; None if it is.
    """

    parts: list[Estimate] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    plainly: str | None = None

    @property
    def price(self) -> Mapping[str, Decimal]:
        """The likely list price of `parts`, by currency."""
        found: dict[str, Decimal] = {}
        for part in self.parts:
            currency = part.call.model.prices.currency
            found[currency] = found.get(currency, Decimal(0)) + part.price
        return found

    @property
    def seconds(self) -> float | None:
        """Device-seconds of `parts`; None where one of them is not known."""
        known = [p.seconds for p in self.parts if p.seconds is not None]
        return sum(known) if len(known) == len(self.parts) else None

    def __str__(self) -> str:
        shown: list[tuple[str, list[list[str]]]] = [
            (f"ESTIMATE {p.call.model.name}", [report(p).split("\n")]) for p in self.parts
        ]
        if self.plainly is not None:
            shown.append(("NOT KNOWN BEFORE", [[f"The query runs as it is: {self.plainly}"]]))
        if self.open:
            shown.append(("NOT KNOWN BEFORE", [self.open]))
        return draw_boxes(shown or [("ESTIMATE", [["Nothing is asked."]])])

    __repr__ = __str__


def estimate_query(
    con: duckdb.DuckDBPyConnection, functions: Functions, query: str, parameters: Parameters
) -> QueryEstimate:
    """Run a query in collect mode as far as answers are known, and count what it would ask."""
    memory = Memory()
    with collecting(functions.session, memory) as (run, collector):
        try:
            statement = read_statement(con, query)
            planned = plan_query(con, functions, statement, parameters, run, collector, partial(look_up, collector))
        except RunsPlainly as reason:
            return QueryEstimate(plainly=str(reason))
        except OpenConstants as found:
            first = found.constants[0]
            others = [site.text for site in found.tagged.sites if site.number != first.site]
            return QueryEstimate([estimate_prompts(functions, first.asked, first.texts)], others)
        collector.order, collector.phase, collector.counting = planned.order, "collect", True
        asked: dict[Asked, dict[str, None]] = {}
        left = {site.number: site.text for site in planned.sites}
        for _ in range(len(left)):
            try:
                round_ = run_round(con, planned, collector, parameters)
            except (duckdb.Error, CompleteError) as error:
                return QueryEstimate(plainly=why_plainly(con, error))
            batch = choose_prompts(round_, planned.order)
            look_up_round(collector, round_)
            for number in [n for n in left if n not in round_.blocked and is_ready(n, round_, planned.order)]:
                del left[number]
                for one, texts in round_.met.get(number, {}).items():
                    asked.setdefault(one, {}).update(dict.fromkeys(sorted(texts)))
            if not all(set(texts) <= memory.of(one).keys() for one, texts in batch.prompts.values()):
                break
        return QueryEstimate(
            [estimate_prompts(functions, one, list(texts)) for one, texts in asked.items()], list(left.values())
        )


def estimate_prompts(functions: Any, asked: Asked, texts: list[str]) -> Estimate:
    found: Estimate = functions.session.estimate(asked.model, texts_column(texts), asked.options, planned=True)
    return found
