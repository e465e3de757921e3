"""Conditions and joins of the outer query are copied into a subquery with completions, so that fewer rows are asked.

DuckDB moves a filter below a projection only if neither can fail, and a join never: over
`(SELECT id, complete(model, text) AS a FROM docs)` the condition `id % 100 = 0` and a join with a table of ten rows
still leave every row of `docs` asked. Here a condition on columns that the subquery makes without a completion is
copied into the subquery. An equality with a column of another table is copied as `column IN (SELECT ... FROM table)`.
The outer query keeps them too, so its rows cannot change; only rows that it would discard are not asked.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import duckdb

from complete_fn_connectors.duckdb_query.call_sites import called_name
from complete_fn_connectors.duckdb_query.guards import children_of, join_conditions
from complete_fn_connectors.duckdb_query.json_versions import Tree
from complete_fn_connectors.duckdb_query.syntax_tree import common_tables, nodes, parse, replace_nodes, table_path

# Join types that drop or repeat rows of a side, but never fill it with NULLs: a filter on it may come before the join.
KEEPS_LEFT, KEEPS_RIGHT = ("INNER", "LEFT", "SEMI", "ANTI"), ("INNER", "RIGHT")
JOINS = ("REGULAR", "CROSS")
OPAQUE = ("SUBQUERY", "WINDOW", "LAMBDA", "STAR", "DEFAULT")
VIRTUAL = ("rowid", "filename", "file_row_number", "file_index")  # columns that no star shows


def push_conditions_down(con: duckdb.DuckDBPyConnection, tree: Tree, functions: Mapping[str, str]) -> Tree:
    """A copy of the tree in which subqueries and common tables that call `functions` have conditions of their readers;
    the tree itself if there is none."""
    found = copy.deepcopy(tree)
    work = ConditionPushdown(con, functions, found)
    work.visit(found)
    return found if work.changed else tree


@dataclass
class FromTable:
    """A table in FROM.

    Attributes:
        select: The SELECT that may take over conditions; None if there is none.
        names: The names of its columns, if they are given.
        made: Names that the outer SELECT gives to other values. A condition may mean these values.
    """

    node: Tree
    select: Tree | None = None
    names: list[str] = field(default_factory=list)
    made: frozenset[str] = frozenset()

    @property
    def alias(self) -> str:
        return str(self.node.get("alias") or self.node.get("table_name") or "").lower()


@dataclass
class ConditionPushdown:
    """Pushes conditions down in `tree`, in place."""

    con: duckdb.DuckDBPyConnection
    functions: Mapping[str, str]
    tree: Tree
    changed: bool = False

    def __post_init__(self) -> None:
        entries = common_tables(self.tree)
        counts, read = Counter(name for name, _ in entries), Counter(map(table_path, nodes(self.tree)))
        self.common = dict(entries)
        self.once = {name for name in self.common if counts[name] == 1 and read[name,] == 1}

    @cached_property
    def tables(self) -> set[str]:
        """Names that only tables have."""
        tables, others = "SELECT table_name FROM duckdb_tables()", "SELECT view_name FROM duckdb_views()"
        return self.names(tables) - self.names(others) - {*self.common}

    @cached_property
    def not_by_row(self) -> set[str]:
        """Functions that may not make one value of one row: aggregates, macros, table functions."""
        query = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type <> 'scalar'"
        return self.names(query) - {*self.functions} | {"unnest", "unlist"}

    def names(self, query: str) -> set[str]:
        return {row[0].lower() for row in self.con.execute(query).fetchall()}

    def visit(self, node: Any) -> None:
        """Visit outer SELECTs first, and later common tables before earlier ones, which they may read."""
        if isinstance(node, list):
            for value in node:
                self.visit(value)
        elif isinstance(node, dict):
            if node.get("type") == "SELECT_NODE":
                self.narrow(node)
            for key, value in node.items():
                if key != "cte_map":
                    self.visit(value)
            for entry in reversed(node.get("cte_map", {}).get("map", [])):
                self.visit(entry["value"])

    def narrow(self, select: Tree) -> None:
        leaves, conditions, using = self.read(select["from_table"])
        where = children_of(select["where_clause"], "CONJUNCTION_AND") if select.get("where_clause") else []
        conditions = [c for c in [*conditions, *where] if self.is_plain(c)]
        known = {leaf.alias: leaf for leaf in leaves}
        if len(known) < len(leaves) or "" in known:
            return
        alone = leaves[0] if len(leaves) == 1 and select["from_table"]["type"] != "JOIN" else None
        for leaf in leaves:
            if leaf.select is None:
                continue
            leaf.made = frozenset(i["alias"].lower() for i in select["select_list"] if is_made(i))
            for condition in conditions:
                if self.owner(condition, known, alone) is leaf:
                    self.put(leaf, self.inside(condition, leaf))
            for mine, other, source in self.equalities(leaf, leaves, conditions, using, known):
                its = [c for c in conditions if self.owner(c, known, None) is source]
                self.put(leaf, self.among(self.inside(mine, leaf), other, source, its))
            if leaf.select.get("where_clause"):
                where = [c for c in where if not self.moved(c, leaf, known, alone)]
        select["where_clause"] = join_conditions("CONJUNCTION_AND", where) if where else None

    def equalities(
        self,
        leaf: FromTable,
        leaves: list[FromTable],
        conditions: list[Tree],
        using: list[str],
        known: Mapping[str, FromTable],
    ) -> Iterator[tuple[Tree, Tree, FromTable]]:
        """(expression of the leaf, expression of another table that it must equal, that table)."""
        for condition in conditions:
            if condition["type"] == "COMPARE_EQUAL":
                sides = condition["left"], condition["right"]
                for mine, other in (sides, sides[::-1]):
                    source = self.owner(other, known, None)
                    if self.owner(mine, known, None) is leaf and source is not None and source is not leaf:
                        yield mine, other, source
        if len(leaves) == 2:
            source = leaves[leaves[0] is leaf]
            for name in using:
                yield make_column(leaf.alias, name), make_column(source.alias, name), source

    def moved(self, condition: Tree, leaf: FromTable, known: Mapping[str, FromTable], alone: FromTable | None) -> bool:
        """Move a condition on answers into the subquery, behind the conditions that reduce the answers.

        DuckDB would move it as well, and may evaluate it first.
        """
        if not self.is_plain(condition, asking=True) or self.owner(condition, known, alone) is not leaf:
            return False
        inside = self.inside(condition, leaf, asking=True)
        if inside is None or not any(called_name(n) in self.functions for n in nodes(inside)):
            return False
        self.put(leaf, inside)
        return True

    def read(self, source: Tree) -> tuple[list[FromTable], list[Tree], list[str]]:
        """(tables whose rows a filter may drop before the joins, conditions that all rows meet, USING columns)."""
        if source["type"] != "JOIN":
            return [self.leaf(source)], [], []
        kind = source["join_type"]
        if source["ref_type"] not in JOINS:
            return [], [], []
        leaves: list[FromTable] = []
        inner = kind == "INNER"
        conditions = children_of(source["condition"], "CONJUNCTION_AND") if inner and source.get("condition") else []
        using = list(source["using_columns"]) if inner else []
        for side, kinds in (("left", KEEPS_LEFT), ("right", KEEPS_RIGHT)):
            if kind in kinds:
                found, more, others = self.read(source[side])
                leaves, conditions, using = leaves + found, conditions + more, using + others
        return leaves, conditions, using

    def leaf(self, source: Tree) -> FromTable:
        names = list(source.get("column_name_alias") or [])
        found = FromTable(source)
        if source.get("sample"):
            return found
        if source["type"] == "SUBQUERY":
            return FromTable(source, self.narrowable(source["subquery"]["node"]), names)
        value = self.read_once(source)
        if value is not None:
            given = list(value.get("aliases") or [])
            return FromTable(source, self.narrowable(value["query_node"]), [*names, *given[len(names) :]])
        return found

    def narrowable(self, select: Tree) -> Tree | None:
        """The SELECT if it has a completion and makes one row of each row of its FROM; else None."""
        if select["type"] != "SELECT_NODE" or not self.asks(select):
            return None
        if any(select.get(k) for k in ("group_expressions", "group_sets", "having", "qualify", "sample")):
            return None
        if any(m["type"] != "ORDER_MODIFIER" for m in select["modifiers"]) or select["from_table"]["type"] == "EMPTY":
            return None
        by_row = not any(n.get("class") == "WINDOW" or self.is_of_many(n) for n in nodes(select["select_list"]))
        return select if by_row and select["aggregate_handling"] == "STANDARD_HANDLING" else None

    def asks(self, tree: Tree) -> bool:
        """Whether a tree calls a completion, itself or in a common table that only this tree reads."""
        read = list(filter(None, map(self.read_once, nodes(tree))))
        return any(called_name(n) in self.functions for n in nodes([tree, read]))

    def read_once(self, node: Tree) -> Tree | None:
        """The common table that only this node refers to; None if there is none."""
        path = table_path(node)
        return self.common[path[0]] if len(path) == 1 and path[0] in self.once else None

    def is_of_many(self, node: Tree) -> bool:
        """Whether a node may be an aggregate or make several rows. Nothing is known of macros, so they count too."""
        return node.get("class") == "FUNCTION" and node["function_name"].lower() in self.not_by_row

    def is_plain(self, condition: Tree, asking: bool = False) -> bool:
        """Whether a condition can be evaluated row by row, and for free unless `asking` is true."""
        return not any(
            n.get("class") in OPAQUE or self.is_of_many(n) or (called_name(n) in self.functions and not asking)
            for n in nodes(condition)
        )

    def owner(self, part: Tree, known: Mapping[str, FromTable], alone: FromTable | None) -> FromTable | None:
        """The table to which all columns of a part belong; None if there is no column or it is unclear."""
        found = set()
        for column in columns_in(part):
            names = column["column_names"]
            if len(names) == 1 and alone is not None:
                found.add(alone.alias)
            else:
                found.add(names[0].lower() if len(names) == 2 else "")
        return known.get(found.pop()) if len(found) == 1 else None

    def inside(self, part: Tree, leaf: FromTable, asking: bool = False) -> Tree | None:
        """The part with the subquery's expressions in place of columns; None if a column has no plain expression."""
        outputs = self.outputs(leaf, asking)
        missing = False

        def change(node: Tree) -> Tree | None:
            nonlocal missing
            if node.get("class") != "COLUMN_REF":
                return None
            found = outputs(node["column_names"][-1].lower())
            missing = missing or found is None
            return found

        changed: Tree = replace_nodes(part, change)
        return None if missing else {**changed, "alias": ""}

    def outputs(self, leaf: FromTable, asking: bool) -> Callable[[str], Tree | None]:
        """A function: name of a column -> the expression in the subquery, or None."""
        items: list[Tree] = leaf.select["select_list"] if leaf.select else []
        stars = [i for i in items if i.get("class") == "STAR"]
        named = [(leaf.names[n : n + 1] or [name_of(item)])[0].lower() for n, item in enumerate(items)]
        counts = Counter(named)
        aliases = {i["alias"].lower() for i in items if i.get("alias")}
        unseen = {*aliases, *leaf.made, *VIRTUAL, *(tables_in(leaf.select["from_table"]) if leaf.select else ())}
        if stars and (leaf.names or len(stars) > 1 or not is_plain_star(stars[0])):
            return lambda name: None

        def output(name: str) -> Tree | None:
            if counts[name] > 1 or not name:
                return None
            if counts[name] == 1:
                item = items[named.index(name)]
                columns = [c["column_names"] for c in columns_in(item)]
                by_alias = any(len(c) == 1 and c[0].lower() in aliases for c in columns)
                return item if columns and not by_alias and self.is_plain(item, asking) else None
            return make_column(stars[0]["relation_name"], name) if stars and name not in unseen else None

        return output

    def among(self, mine: Tree | None, other: Tree, source: FromTable, its: list[Tree]) -> Tree | None:
        """`mine IN (SELECT other FROM source WHERE its conditions)`, for a source that is a table."""
        path = table_path(source.node)
        if mine is None or not path or path[-1] not in self.tables or source.node.get("sample"):
            return None
        within: Tree = parse(self.con, "SELECT 1 WHERE 1 IN (SELECT 1)")["node"]["where_clause"]
        within["child"] = mine
        select: Tree = within["subquery"]["node"]
        select["select_list"], select["from_table"] = [{**other, "alias": ""}], copy.deepcopy(source.node)
        select["where_clause"] = join_conditions("CONJUNCTION_AND", its) if its else None
        return within

    def put(self, leaf: FromTable, condition: Tree | None) -> None:
        """AND the condition to the subquery's own."""
        if condition is None or leaf.select is None:
            return
        where = leaf.select.get("where_clause")
        parts = [*(children_of(where, "CONJUNCTION_AND") if where else []), copy.deepcopy(condition)]
        leaf.select["where_clause"] = join_conditions("CONJUNCTION_AND", parts)
        self.changed = True


def columns_in(tree: Any) -> Iterator[Tree]:
    return (node for node in nodes(tree) if node.get("class") == "COLUMN_REF")


def tables_in(source: Tree) -> set[str]:
    """The names of the tables in a FROM. Each is also the name of a hidden column: the whole row."""
    sources = [n for n in nodes(source) if isinstance(n.get("alias"), str) and "sample" in n]
    return {str(n["alias"] or n.get("table_name") or "").lower() for n in sources}


def make_column(table: str, name: str) -> Tree:
    names = [table, name] if table else [name]
    return {"class": "COLUMN_REF", "type": "COLUMN_REF", "alias": "", "query_location": 0, "column_names": names}


def name_of(item: Tree) -> str:
    """The name of a column of a SELECT; '' where DuckDB makes a name from the expression."""
    names: list[str] = item.get("column_names") or [""]
    return str(item.get("alias") or names[-1])


def is_made(item: Tree) -> bool:
    """Whether an item of a SELECT has an alias that is not its column's name."""
    names: list[str] = item.get("column_names") or [""]
    return bool(item.get("alias")) and item["alias"].lower() != names[-1].lower()


def is_plain_star(star: Tree) -> bool:
    """Whether a star is `*` or `t.*` and nothing else."""
    lists = ("exclude_list", "replace_list", "qualified_exclude_list", "rename_list")
    return not star.get("columns") and star.get("expr") is None and not any(star.get(k) for k in lists)
