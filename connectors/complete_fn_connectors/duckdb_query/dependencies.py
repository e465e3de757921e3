"""The plan of DuckDB's optimiser says which call site must wait for the answers of which other.

A prompt made from a placeholder would be paid for nothing, so a site is asked only when all sites it depends on have
their answers. By its place in the plan, a site depends on:

1. the calls in its arguments,
2. the calls that guard it in CASE, COALESCE, AND and OR,
3. the calls in the operators below it,
4. the calls on the side of a join that is read first: the right side builds the hash table, which decides whether the
   left side is read at all, and which of its rows.

A missing dependency can buy a wrong prompt; an extra one costs only a round. So what is not known is a dependency. A
site that depends on itself is not planned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import duckdb

from complete_fn_connectors.duckdb_query.call_sites import SITE, without_places
from complete_fn_connectors.duckdb_query.json_versions import Tree, modern_plan
from complete_fn_connectors.duckdb_query.syntax_tree import (
    RunsPlainly,
    fetch_value,
    nodes,
    replace_nodes,
    to_text,
)

BUILD_FIRST = (
    "LOGICAL_COMPARISON_JOIN",
    "LOGICAL_ANY_JOIN",
    "LOGICAL_CROSS_PRODUCT",
    "LOGICAL_EXCEPT",
    "LOGICAL_INTERSECT",
)
ENTANGLED = ("LOGICAL_DELIM_JOIN", "LOGICAL_DEPENDENT_JOIN", "LOGICAL_POSITIONAL_JOIN", "LOGICAL_ASOF_JOIN")
BLOCKING = ("LOGICAL_AGGREGATE_AND_GROUP_BY", "LOGICAL_ORDER_BY", "LOGICAL_WINDOW", "LOGICAL_DISTINCT")
ROW_BY_ROW = ("LOGICAL_PROJECTION", "LOGICAL_FILTER", "LOGICAL_GET", "LOGICAL_LIMIT", "LOGICAL_TOP_N", *BLOCKING)
READABLE = (
    *("seq_scan", "range", "generate_series", "unnest", "repeat"),
    *("parquet_scan", "read_parquet", "read_csv", "read_csv_auto", "read_json", "read_json_auto", "read_ndjson"),
)
LATE = 50  # rows of LIMIT up to which DuckDB fetches columns late, a plan that it cannot serialise


@dataclass
class LimitWindow:
    """The calls below one LIMIT, which stops as soon as `need` rows came through; `outermost`: they are the result."""

    need: int
    outermost: bool
    filters_only: bool = False


@dataclass
class Order:
    """The order in which sites may be asked.

    Attributes:
        waits: By site, the sites whose answers must be known before.
        rank: The order of the sites' first evaluations in the plan.
        windows: By site below a LIMIT, the window of the LIMIT.
        unranked: Sites that are not planned, with the reason.
        elsewhere: Sites that are evaluated outside of filters and scans.
        early: Sites of a filter that come before a condition without calls, unless this condition guards them.
    """

    waits: dict[int, set[int]] = field(default_factory=dict)
    rank: dict[int, int] = field(default_factory=dict)
    windows: dict[int, LimitWindow] = field(default_factory=dict)
    unranked: dict[int, str] = field(default_factory=dict)
    elsewhere: set[int] = field(default_factory=set)
    early: set[int] = field(default_factory=set)

    def close(self) -> None:
        """Add the dependencies of dependencies. A site that depends on itself becomes unranked."""
        for middle in list(self.waits):
            for waits in self.waits.values():
                if middle in waits:
                    waits |= self.waits.get(middle, set())
        for site, waits in self.waits.items():
            if site in waits:
                self.unranked.setdefault(site, "it depends on its own answers")


def read_plan(con: duckdb.DuckDBPyConnection, select: str, optimise: bool = True) -> Tree:
    """The root operator of the plan of a SELECT, without parameters.

    Raises:
        RunsPlainly: DuckDB cannot plan or serialise it.
    """
    query = "SELECT json_serialize_plan(?::VARCHAR, optimize := ?, skip_default := true)"
    text = fetch_value(con, query, select, optimise)
    try:
        found = json.loads(text or "")
    except ValueError:  # a constant in it is no valid JSON, as NaN
        raise RunsPlainly("DuckDB does not show its plan") from None
    if found.get("error"):
        raise RunsPlainly(f"DuckDB does not show its plan: {found.get('error_message')}")
    return modern_plan(found["plans"][0])


def refuse_volatile(con: duckdb.DuckDBPyConnection, plan: Tree, ours: Iterable[str]) -> None:
    """Refuse a query whose rows may differ from run to run: it may be run only once.

    Args:
        plan: not optimised, so that nothing is folded away; views and macros are expanded in it.

    Raises:
        RunsPlainly: a function that is not constant, a table that is not DuckDB's, or a call hidden in a macro.
    """
    query = "SELECT list(DISTINCT function_name) FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
    # DuckDB 1.4 puts error() beside each subquery that may give one row only.
    changing = set(fetch_value(con, query) or ()) - {"error"}
    hidden = set(ours)
    for node in nodes(plan):
        name = (node.get("qname") or {}).get("path", [""])[-1]
        kind = node.get("type")
        if kind == "LOGICAL_SAMPLE":
            raise RunsPlainly("it takes a sample")
        if kind == "LOGICAL_GET" and name not in READABLE:
            raise RunsPlainly(f"it reads from {name or 'elsewhere'}")
        if kind != "LOGICAL_GET" and name in changing and not name.startswith(SITE):
            raise RunsPlainly(f"{name}() may differ from run to run")
        if name in hidden:
            raise RunsPlainly(f"{name}() is called inside a macro, a lambda or with named arguments")


def read_order(plan: Tree) -> Order:
    """The order of the sites in an optimised plan."""
    reader = Reader()
    reader.visit(plan, frozenset(), None, True)
    reader.order.close()
    return reader.order


Sites = frozenset[int]
NONE: Sites = frozenset()


class Reader:
    """Walks the plan in the order in which DuckDB evaluates it."""

    def __init__(self) -> None:
        self.order = Order()
        self.clean: dict[int, bool] = {}  # site -> whether all rows that came up from below have been asked there

    def visit(self, op: Tree, before: Sites, window: LimitWindow | None, top: bool) -> Sites:
        """Read an operator and the operators below it; returns their sites.

        Args:
            before: Sites of other branches that are evaluated first.
            window: The window of a LIMIT above that can stop this operator early.
            top: Whether only projections lie above.
        """
        kind, children = op["type"], op.get("children", [])
        below = self.children(op, kind, children, before, window, top and kind == "LOGICAL_PROJECTION")
        if kind not in ROW_BY_ROW:
            self.clean = dict.fromkeys(self.clean, False)
        if kind == "LOGICAL_FILTER":
            self.order.early |= early_sites(op.get("expressions", []))
        own = [v for k, v in op.items() if k != "children"]
        here = Expressions(op, kind in ("LOGICAL_FILTER", "LOGICAL_GET"))
        for number, guards, conditional in here.read(own):
            self.note(number, before, below, guards, kind, window)
            self.clean[number] = self.clean.get(number, True) and not conditional
        if here.in_lambda:
            self.order.unranked |= dict.fromkeys(here.in_lambda, "it is called for the elements of a list")
        return below | here.found

    def note(self, n: int, before: Sites, below: Sites, guards: Sites, kind: str, window: LimitWindow | None) -> None:
        order = self.order
        order.rank.setdefault(n, len(order.rank))
        if n in before or (n in below and not self.clean.get(n, False)):
            order.unranked[n] = "it depends on its own answers"
        order.waits.setdefault(n, set()).update((before | below | guards) - {n})
        filters = kind in ("LOGICAL_FILTER", "LOGICAL_GET")
        if not filters:
            order.elsewhere.add(n)
        if window is not None and (filters or not window.filters_only):
            earlier = order.windows.get(n)
            order.windows[n] = window if earlier in (None, window) else LimitWindow(0, False)

    def children(
        self, op: Tree, kind: str, children: list[Tree], before: Sites, window: LimitWindow | None, top: bool
    ) -> Sites:
        if kind in BUILD_FIRST or kind in ENTANGLED:
            left, right = children
            first = self.visit(right, before | (sites_below(left) if kind in ENTANGLED else NONE), None, False)
            return first | self.visit(left, before | first, window, False)
        if kind == "LOGICAL_MATERIALIZED_CTE":
            first = self.visit(children[0], before, None, False)
            return first | self.visit(children[1], before | first, window, top)
        if kind == "LOGICAL_RECURSIVE_CTE":
            start = self.visit(children[0], before, None, False)
            again = self.visit(children[1], before | start, None, False)
            self.order.unranked |= dict.fromkeys(again, "it is called in a recursion")
            return start | again
        if kind in ("LOGICAL_LIMIT", "LOGICAL_TOP_N"):
            window = self.limited(op, kind, window, top)
        elif kind in BLOCKING:
            window = None
        found = NONE
        for child in children:  # of a UNION; below a LIMIT the first part may make the second unnecessary
            found |= self.visit(child, before | (found if window else NONE), window, top)
        return found

    def limited(self, op: Tree, kind: str, outer: LimitWindow | None, top: bool) -> LimitWindow | None:
        """The window below a LIMIT. ORDER BY with LIMIT has one only if the rows found so far filter the others."""
        if kind == "LOGICAL_TOP_N":
            if "DYNAMIC_FILTER" not in json.dumps(op):
                return None
            return LimitWindow(op.get("limit", 0) + op.get("offset", 0), top and outer is None, filters_only=True)
        if "PERCENT" in (op.get("limit_val") or {}).get("type", ""):
            return None
        need = sum(limit_number(op.get(k)) for k in ("limit_val", "offset_val"))
        return LimitWindow(0 if outer else need, top and outer is None)


def limit_number(limit: Tree | None) -> int:
    """The number of a LIMIT or OFFSET, 0 where it is none."""
    return int((limit or {}).get("constant_integer", 0))


@dataclass(frozen=True)
class ExpressionPlace:
    """The place of a part in the expressions of an operator.

    Attributes:
        guards: Sites that decide whether the part is evaluated.
        conditional: Whether a row may pass the operator without an evaluation of the part.
        holds: Whether only rows pass for which the part is true. Such rows have been through all of an AND.
    """

    guards: Sites = NONE
    conditional: bool = False
    in_lambda: bool = False
    holds: bool = False


@dataclass
class Expressions:
    """The expressions of one operator. `sequence`: each is evaluated only where those before it hold."""

    op: Tree
    sequence: bool
    found: Sites = NONE
    in_lambda: set[int] = field(default_factory=set)

    def read(self, own: list[Any]) -> Iterator[tuple[int, Sites, bool]]:
        """(site, sites that decide about it or make its prompts, whether a row may pass without asking it)."""
        yield from self.walk(own, ExpressionPlace(holds=self.sequence))

    def walk(self, node: Any, at: ExpressionPlace) -> Iterator[tuple[int, Sites, bool]]:
        if isinstance(node, list):
            yield from self.in_turn(node, at, self.sequence)
        elif isinstance(node, dict):
            kind = node.get("type")
            if kind == "CASE_EXPR":
                yield from self.case(node, replace(at, holds=at.holds and is_guard(node)))
            elif kind == "CONJUNCTION_AND":
                yield from self.in_turn(node.get("children", []), at, True)
            elif kind in ("CONJUNCTION_OR", "OPERATOR_COALESCE"):
                yield from self.in_turn(node.get("children", []), replace(at, holds=False), True)
            else:
                yield from self.call(node, replace(at, holds=at.holds and not node.get("expression_class")))

    def call(self, node: Tree, at: ExpressionPlace) -> Iterator[tuple[int, Sites, bool]]:
        number = planned_site(node)
        inner = NONE
        for key, value in node.items():
            inside = replace(at, in_lambda=at.in_lambda or key == "lambda_expr")
            lists = value if isinstance(value, list) and node.get("expression_class") else [value]
            for part in lists:
                for found in self.walk(part, inside):
                    inner |= {found[0]}
                    yield found
        if number is not None:
            self.found |= {number}
            if at.in_lambda:
                self.in_lambda.add(number)
            yield number, (at.guards | inner) - {number}, at.conditional

    def in_turn(self, parts: list[Any], at: ExpressionPlace, ordered: bool) -> Iterator[tuple[int, Sites, bool]]:
        """Read parts one after the other. If they are `ordered`, each decides whether the next is evaluated."""
        for n, part in enumerate(parts):
            for found in self.walk(part, at):
                yield found
                if ordered:
                    at = replace(at, guards=at.guards | {found[0]})
            if ordered and n == 0 and not at.holds:
                at = replace(at, conditional=True)

    def case(self, node: Tree, at: ExpressionPlace) -> Iterator[tuple[int, Sites, bool]]:
        for check in node.get("case_checks", []):
            for found in self.walk(check.get("when_expr"), at):
                at = replace(at, guards=at.guards | {found[0]})
                yield found
            at = replace(at, conditional=at.conditional or not at.holds)
            yield from self.walk(check.get("then_expr"), at)
        yield from self.walk(node.get("else_expr"), replace(at, conditional=True, holds=False))


def is_guard(case: Tree) -> bool:
    """Whether it is `CASE WHEN a THEN b ELSE false END`, an AND that keeps its order."""
    last = (case.get("else_expr") or {}).get("value") or {}
    return len(case.get("case_checks", [])) == 1 and last.get("value") is False


def planned_site(node: Tree) -> int | None:
    """The number of a tagged call, in a plan."""
    path = (node.get("qname") or {}).get("path", [""])
    if not path[-1].startswith(SITE):
        return None
    token: str = node["children"][0].get("value", {}).get("value", ":")
    return int(token.rpartition(":")[2])


def early_sites(conditions: list[Tree]) -> set[int]:
    """The sites of conditions that a filter has before a condition without calls, unless this condition guards them."""
    sites = [sites_below(c) for c in conditions]
    found: set[int] = set()
    for n, condition in enumerate(conditions):
        cheap = {text_without_places(c) for c, its in zip(conditions[n + 1 :], sites[n + 1 :], strict=True) if not its}
        if not cheap <= guards_of(condition):
            found |= sites[n]
    return found


def guards_of(condition: Tree) -> set[str]:
    """The conditions of a CASE that must hold before its other parts are evaluated, as text."""
    if condition.get("type") != "CASE_EXPR" or not is_guard(condition):
        return set()
    when = condition["case_checks"][0]["when_expr"]
    return {text_without_places(part) for part in (when["children"] if when["type"] == "CONJUNCTION_AND" else [when])}


def text_without_places(expression: Tree) -> str:
    """An expression of a plan as text, without its places in the query."""
    return json.dumps(without_places(expression), sort_keys=True)


def sites_below(op: Tree) -> Sites:
    return frozenset(n for n in map(planned_site, nodes(op)) if n is not None)


def optimised_plan(con: duckdb.DuckDBPyConnection, constant: Tree) -> Tree:
    """DuckDB's plan. A small LIMIT is made larger where DuckDB would fetch columns late: it cannot serialise such a
    plan."""
    try:
        return read_plan(con, to_text(con, constant))
    except RunsPlainly:
        return read_plan(con, to_text(con, replace_nodes(constant, larger_limit)))


def larger_limit(node: Tree) -> Tree | None:
    if node.get("type") != "LIMIT_MODIFIER" or not str((node["limit"] or {}).get("literal", {}).get("text")).isdigit():
        return None
    literal = node["limit"]["literal"]
    rows = int(literal["text"])
    grown = {**literal, "text": str(rows + 1000 if rows <= LATE else rows)}
    return {**node, "limit": {**node["limit"], "literal": grown}}
