"""`explain` shows what `sql` would do with a query: rounds, prompts of each call, guards, known answers. It pays
nothing."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import duckdb

from complete_fn.errors import CompleteError
from complete_fn_connectors.duckdb_query.call_sites import Site
from complete_fn_connectors.duckdb_query.collect import (
    Collector,
    Constant,
    Functions,
    Memory,
    Round,
    choose_prompts,
    texts_column,
)
from complete_fn_connectors.duckdb_query.constants import OpenConstants
from complete_fn_connectors.duckdb_query.dependencies import Order
from complete_fn_connectors.duckdb_query.planner import Planned, collecting, plan_query, run_round, why_plainly
from complete_fn_connectors.duckdb_query.syntax_tree import Parameters, RunsPlainly, read_statement

WIDTH = 76  # columns of a box, borders included


@dataclass
class SitePlan:
    """One call site. `prompts` and `known` count distinct prompts; None while these depend on answers that are not
    known yet.

    Attributes:
        constant: Whether DuckDB needs its answer to plan, so that it is asked before all others.
    """

    site: Site
    round: int
    after: list[int]
    guards: list[str]
    models: list[str] = field(default_factory=list)
    rows: int | None = None
    prompts: int | None = None
    known: int | None = None
    unplanned: str | None = None
    windowed: bool = False
    constant: bool = False


@dataclass
class Explanation:
    """The plan of a query. It is printed as boxes, from the first round to the query itself.

    Attributes:
        plainly: why the query is not planned at all; None if it is.
        final: the query as it runs at the end, with its guards.
    """

    sites: list[SitePlan] = field(default_factory=list)
    final: str = ""
    plainly: str | None = None

    @property
    def rounds(self) -> int:
        return max((s.round for s in self.sites if s.unplanned is None), default=0)

    def __str__(self) -> str:
        if self.plainly is not None:
            return draw_boxes(
                [
                    (
                        "AS IT IS",
                        [
                            [
                                f"Not planned as a whole: {self.plainly}.",
                                "Its calls are asked as DuckDB makes them, at most 2,048 rows at a time.",
                            ]
                        ],
                    )
                ]
            )
        drawn = []
        for number in range(1, self.rounds + 1):
            chosen = [s for s in self.sites if s.round == number and s.unplanned is None]
            drawn.append((f"ROUND {number}", [site_lines(s) for s in chosen]))
        plain = [site_lines(s) for s in self.sites if s.unplanned is not None]
        drawn.append(("QUERY", [[self.final], *plain]))
        return draw_boxes(drawn)

    __repr__ = __str__


def explain_query(
    con: duckdb.DuckDBPyConnection, functions: Functions, query: str, parameters: Parameters
) -> Explanation:
    """Plan a query and run it in collect mode as far as answers are known."""
    memory = Memory()
    with collecting(functions.session, memory) as (run, collector):
        try:
            statement = read_statement(con, query)
            planned = plan_query(con, functions, statement, parameters, run, collector, partial(look_up, collector))
        except RunsPlainly as reason:
            return Explanation(final=query, plainly=str(reason))
        except OpenConstants as open_:
            return Explanation(before_planning(open_, collector), " ".join(statement.text.split()))
        collector.order, collector.phase, collector.counting = planned.order, "collect", True
        found = {site.number: plan_site(site, planned) for site in planned.sites}
        try:
            for _ in range(max((s.round for s in found.values()), default=0)):
                if not look_ahead(con, planned, collector, parameters, found):
                    break
        except (duckdb.Error, CompleteError) as error:
            return Explanation(final=query, plainly=why_plainly(con, error))
        return Explanation([found[s.number] for s in planned.sites], " ".join(planned.final.split()))


def before_planning(found: OpenConstants, collector: Collector) -> list[SitePlan]:
    """The sites of a query that DuckDB cannot plan before it has the answer of a constant call. Only this call is
    certain."""
    first = found.constants[0]
    plans = []
    for site in found.tagged.sites:
        if site.number == first.site:
            plan = SitePlan(site, 1, [], [], [first.asked.model], 1, len(first.texts), 0, constant=True)
        elif site.number in found.sites:
            plan = SitePlan(site, 2, [first.site + 1], [], constant=True)
        else:
            plan = SitePlan(site, 2 + (len(found.sites) > 1), sorted(n + 1 for n in found.sites), [])
        plans.append(plan)
    return plans


def plan_site(site: Site, planned: Planned) -> SitePlan:
    waits = sorted(n + 1 for n in planned.order.waits.get(site.number, ()))
    reason = planned.order.unranked.get(site.number)
    guards, windowed = planned.guards.get(site.number, []), site.number in planned.order.windows
    return SitePlan(site, round_of(site.number, planned.order), waits, guards, unplanned=reason, windowed=windowed)


def round_of(number: int, order: Order, depth: int = 0) -> int:
    """The round in which a site is asked: one after the last site it waits for."""
    waits = order.waits.get(number, set()) - {number}
    return 1 + max((round_of(w, order, depth + 1) for w in waits), default=0) if depth < 50 else 1


def look_ahead(
    con: duckdb.DuckDBPyConnection,
    planned: Planned,
    collector: Collector,
    parameters: Parameters,
    found: dict[int, SitePlan],
) -> bool:
    """Count what a round would ask, without asking. Returns whether all its answers are known already."""
    round_ = run_round(con, planned, collector, parameters)
    batch = choose_prompts(round_, planned.order)
    look_up_round(collector, round_)
    for number in round_.blocked:
        found[number].unplanned = "its answers may not be reused"
    for number, plan in found.items():
        if plan.rows is None and is_ready(number, round_, planned.order):
            count(plan, number, round_, collector.memory)
    return bool(batch.prompts) and all(
        set(texts) <= collector.memory.of(asked).keys() for asked, texts in batch.prompts.values()
    )


def is_ready(number: int, round_: Round, order: Order) -> bool:
    """Whether a site's prompts are certain: all answers that it waits for are known."""
    return not (order.waits.get(number, set()) & round_.unknown) and number not in order.unranked


def count(plan: SitePlan, number: int, round_: Round, memory: Memory) -> None:
    met = round_.met.get(number, {})
    plan.rows = round_.rows.get(number, 0)
    plan.prompts = sum(map(len, met.values()))
    plan.known = sum(len(texts & memory.of(asked).keys()) for asked, texts in met.items())
    plan.models = sorted({asked.model for asked in met})


def look_up_round(collector: Collector, round_: Round) -> None:
    """Take the stored answers of all prompts of a round into memory."""
    for met in round_.met.values():
        for asked, texts in met.items():
            known = collector.memory.of(asked)
            missing = [t for t in texts if t not in known]
            known.update(collector.session.known(asked.model, texts_column(missing), asked.lenient()))


def look_up(collector: Collector, constant: Constant) -> bool:
    """Take the stored answer of a constant call into memory; False if there is none."""
    asked = constant.asked
    found = collector.session.known(asked.model, texts_column(constant.texts), asked.lenient())
    collector.memory.of(asked).update(found)
    return found.keys() >= {*constant.texts}


def site_lines(plan: SitePlan) -> list[str]:
    """The lines of one call site."""
    lines = [f"#{plan.site.number + 1} {plan.site.text}"]
    if plan.unplanned is not None:
        return [*lines, f"runs plainly: {plan.unplanned}"]
    if plan.constant:
        lines.append("constant: asked while DuckDB plans")
    if plan.after:
        lines.append("after " + ", ".join(f"#{n}" for n in plan.after))
    lines += [f"guard: {g}" for g in plan.guards]
    if plan.prompts is None or plan.known is None:
        return [*lines, "prompts: depend on answers of an earlier round"]
    asked = f" of {', '.join(plan.models)}" if plan.models else ""
    counts = Counter(known=plan.known, ask=plan.prompts - plan.known)
    lines += [f"{plan.rows:,} rows, {plan.prompts:,} prompts{asked}"]
    if plan.windowed:
        lines.append("asked in growing windows until the LIMIT has its rows")
    return [*lines, f"{counts['known']:,} known, {'at most ' * plan.windowed}{counts['ask']:,} to ask"]


def draw_boxes(drawn: list[tuple[str, list[list[str]]]]) -> str:
    """Boxes below each other, each with a title and blocks of lines, as DuckDB draws its plans."""
    inner, middle = WIDTH - 2, (WIDTH - 2) // 2
    edge = "─" * middle + "┬" + "─" * (inner - middle - 1)
    rows: list[str] = []
    for number, (title, blocks) in enumerate(drawn):
        rows.append("┌" + (edge.replace("┬", "┴") if number else "─" * inner) + "┐")
        rows.append("│" + title.center(inner) + "│")
        for block in blocks:
            rows.append("│" + ("─" * (inner // 2)).center(inner) + "│")
            for line in block:
                rows += ["│ " + part.ljust(inner - 2) + " │" for part in textwrap.wrap(line, inner - 2) or [""]]
        rows.append("└" + (edge if number < len(drawn) - 1 else "─" * inner) + "┘")
    return "\n".join(rows)
