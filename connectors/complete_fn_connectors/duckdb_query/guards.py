"""In a WHERE, conditions without a completion decide first: CASE keeps DuckDB to that order.

DuckDB may evaluate any conjunct first, and after some thousand rows it settles on an order of its own. In a filter,
where NULL counts as false, `cheap AND ai` is `CASE WHEN cheap THEN ai ELSE false END`, and `cheap OR ai` is
`CASE WHEN cheap THEN true ELSE ai END`. Several completions keep the order of DuckDB's own plan, so that none is asked
about more rows than before. The cheap conditions stay where they are as well: scans and joins still use them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from complete_fn_connectors.duckdb_query.call_sites import sites_in
from complete_fn_connectors.duckdb_query.dependencies import Order
from complete_fn_connectors.duckdb_query.json_versions import Tree
from complete_fn_connectors.duckdb_query.syntax_tree import nodes


@dataclass
class Guarding:
    """Rewrites the WHERE clauses of a tagged tree.

    Attributes:
        order: The order of the sites in the plan without guards.
        guards: By site, the conditions that were put before it, as trees.
    """

    order: Order
    guards: dict[int, list[Tree]] = field(default_factory=dict)

    def apply(self, tree: Tree) -> Tree:
        """A copy of the tree with guards, which `guards` then lists."""

        def walk(node: Any) -> Any:
            if isinstance(node, list):
                return [walk(v) for v in node]
            if not isinstance(node, dict) or node.get("class") == "SUBQUERY":  # its conditions may be on outer rows
                return node
            inner = {k: walk(v) for k, v in node.items()}
            if node.get("type") == "SELECT_NODE" and node.get("where_clause"):
                inner["where_clause"] = self.filter(inner["where_clause"], inner.get("from_table") or {})
            return inner

        found: Tree = walk(tree)
        return found

    def filter(self, where: Tree, source: Tree) -> Tree:
        """A WHERE clause with its completions last; over a join, those of each table among its own conditions."""
        parts = children_of(where, "CONJUNCTION_AND")
        owners = ["" if source.get("type") != "JOIN" else owner(p) for p in parts]
        chains, moved = [], []
        for name in dict.fromkeys(o for o in owners if o is not None):
            mine = [p for p, o in zip(parts, owners, strict=True) if o == name]
            cheap, costly = [p for p in mine if self.may_guard(p)], [p for p in mine if self.may_move(p)]
            if costly and (cheap or len(costly) > 1 or any(map(is_disjunction, costly))):
                chains.append(self.chain(cheap, costly))
                moved += costly
        kept = [p for p in parts if not any(p is m for m in moved)]
        return join_conditions("CONJUNCTION_AND", [*kept, *chains]) if chains else where

    def chain(self, cheap: list[Tree], costly: list[Tree]) -> Tree:
        """Conditions of which each is evaluated only where all before it hold."""
        ordered = self.in_order(costly)
        found = self.alternatives(ordered[-1])
        for part in ordered[-2::-1]:
            found = make_case(self.alternatives(part), found, FALSE)
        for part in ordered:
            self.remember(part, cheap)
        return make_case(join_conditions("CONJUNCTION_AND", cheap), found, FALSE) if cheap else found

    def alternatives(self, part: Tree) -> Tree:
        """A disjunction with its cheap conditions first; another condition as it is."""
        cheap, costly = self.split(part, "CONJUNCTION_OR")
        if not costly:
            return part
        ordered = self.in_order(costly)
        found = self.conjunction(ordered[-1])
        for branch in ordered[-2::-1]:
            found = make_case(self.conjunction(branch), TRUE, found)
        return make_case(join_conditions("CONJUNCTION_OR", cheap), TRUE, found) if cheap else found

    def conjunction(self, part: Tree) -> Tree:
        """A conjunction inside of a disjunction, ordered like the outermost one."""
        cheap, costly = self.split(part, "CONJUNCTION_AND")
        return self.chain(cheap, costly) if costly else part

    def split(self, part: Tree, kind: str) -> tuple[list[Tree], list[Tree]]:
        """(cheap, costly) conditions of a junction; both empty for another condition, or where one is neither."""
        parts = children_of(part, kind)
        cheap, costly = [p for p in parts if self.may_guard(p)], [p for p in parts if self.may_move(p)]
        return (cheap, costly) if 1 < len(parts) == len(cheap) + len(costly) else ([], [])

    def may_guard(self, part: Tree) -> bool:
        return not sites_in(part) and not any(n.get("class") in ("SUBQUERY", "WINDOW", "LAMBDA") for n in nodes(part))

    def may_move(self, part: Tree) -> bool:
        """Whether all completions of a condition are evaluated in a filter. A condition that joins tables must stay."""
        sites = sites_in(part)
        moves = bool(sites) and not sites & self.order.elsewhere and not sites & set(self.order.unranked)
        return moves and not any(n.get("class") in ("SUBQUERY", "WINDOW") for n in nodes(part))

    def in_order(self, parts: list[Tree]) -> list[Tree]:
        ranks = self.order.rank
        return sorted(parts, key=lambda p: min((ranks.get(s, len(ranks)) for s in sites_in(p)), default=len(ranks)))

    def remember(self, part: Tree, cheap: list[Tree]) -> None:
        for site in sites_in(part):
            self.guards.setdefault(site, []).extend(cheap)


def owner(part: Tree) -> str | None:
    """The table (as the query names it) that all columns of a condition are qualified with; None if that is unclear."""
    columns = [n["column_names"] for n in nodes(part) if n.get("class") == "COLUMN_REF"]
    names = {c[0].lower() if len(c) > 1 else None for c in columns}
    return names.pop() if len(names) == 1 else None


def is_disjunction(part: Tree) -> bool:
    return bool(part.get("type") == "CONJUNCTION_OR")


def children_of(part: Tree, kind: str) -> list[Tree]:
    """The conditions of nested conjunctions (or disjunctions) of one kind, in the order written."""
    if part.get("type") != kind:
        return [part]
    return [leaf for child in part["children"] for leaf in children_of(child, kind)]


def join_conditions(kind: str, parts: list[Tree]) -> Tree:
    if len(parts) == 1:
        return parts[0]
    return {"class": "CONJUNCTION", "type": kind, "alias": "", "query_location": 0, "children": parts}


def make_case(when: Tree, then: Tree, otherwise: Tree) -> Tree:
    checks = [{"when_expr": when, "then_expr": then}]
    shape = {"class": "CASE", "type": "CASE_EXPR", "alias": "", "query_location": 0}
    return {**shape, "case_checks": checks, "else_expr": otherwise}


def make_boolean(text: str) -> Tree:
    literal = {"kind": "BOOLEAN", "text": text}
    return {"class": "CONSTANT", "type": "VALUE_CONSTANT", "alias": "", "query_location": 0, "literal": literal}


TRUE, FALSE = make_boolean("true"), make_boolean("false")
