"""Views that call completions become subqueries of the query that reads them, so that it is planned as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import duckdb

from complete_fn_connectors.duckdb_query.call_sites import called_name
from complete_fn_connectors.duckdb_query.json_versions import Tree
from complete_fn_connectors.duckdb_query.syntax_tree import (
    RunsPlainly,
    common_tables,
    lower_path,
    nodes,
    parse,
    replace_nodes,
    table_path,
    tokens,
)

Path: TypeAlias = tuple[str, ...]
UNKNOWN = 2**63  # DuckDB gives 2^64 - 1 as the place of a node that was not written


def inline_views(
    con: duckdb.DuckDBPyConnection, tree: Tree, text: str, functions: Mapping[str, str]
) -> tuple[Tree, str]:
    """The tree with a subquery for each view that calls one of `functions`, and the text to which its places refer.

    A view stays where a name could come to mean something else: a name that several schemas have, or that is also the
    name of a common table expression.
    """
    views, hidden = Views(con, functions, text), common_names(tree)
    found = replace_nodes(tree, lambda node: views.opened(node, hidden))
    return (found, views.text) if found != tree else (tree, text)


@dataclass
class Views:
    """The views of a connection. `text` grows by the text of each view that is inlined."""

    con: duckdb.DuckDBPyConnection
    functions: Mapping[str, str]
    text: str
    open: list[Path] = field(default_factory=list)

    @cached_property
    def sql(self) -> dict[Path, str]:
        """(database, schema, name) -> the statement that made it, of every view but DuckDB's own."""
        query = "SELECT database_name, schema_name, view_name, sql FROM duckdb_views() WHERE NOT internal"
        return {lower_path(row[:3]): row[3] for row in self.con.execute(query).fetchall()}

    @cached_property
    def known(self) -> Counter[Path]:
        """The number of tables and views that a name may mean, by its last one, two or three parts."""
        query = (
            "SELECT database_name, schema_name, table_name FROM duckdb_tables() "
            "UNION ALL SELECT database_name, schema_name, view_name FROM duckdb_views()"
        )
        full = [lower_path(row) for row in self.con.execute(query).fetchall()]
        return Counter(path[first:] for path in full for first in range(3))

    def opened(self, node: Tree, hidden: frozenset[str]) -> Tree | None:
        """The subquery for a reference to such a view; None for another node. `hidden`: names of common tables."""
        path = table_path(node)
        if not path or node.get("sample") or node.get("at_clause") or not self.plain(path, hidden):
            return None
        named = [known for known in self.sql if known[-len(path) :] == path]
        if len(named) != 1 or named[0] in self.open:
            return None
        self.open.append(named[0])
        try:
            inner = self.select(named[0], hidden)
        finally:
            self.open.pop()
        if inner is None:
            return None
        given = node["column_name_alias"]
        names = [*given, *self.columns(named[0])[len(given) :]]
        kept: Tree = {k: node[k] for k in ("sample", "query_location", "query_location_length") if k in node}
        alias = node["alias"] or node["table_name"]
        return {"type": "SUBQUERY", **kept, "alias": alias, "subquery": inner, "column_name_alias": names}

    def select(self, view: Path, hidden: frozenset[str]) -> Tree | None:
        """The view's SELECT with the views in it opened; None if it calls nothing or a name in it is in doubt."""
        text = select_of(self.sql[view])
        try:
            tree = parse(self.con, text)
        except RunsPlainly:
            return None
        own = common_names(tree)
        paths = filter(None, map(table_path, nodes(tree)))
        if own & hidden or not all(path[-1] in own or self.plain(path, hidden) for path in paths):
            return None
        begin = len(self.text.encode()) + 1
        self.text += f"\n{text}"
        whole: Tree = replace_nodes(shift_places(tree, begin), lambda node: self.opened(node, hidden | own))
        return whole if any(called_name(node) in self.functions for node in nodes(whole)) else None

    def plain(self, path: Path, hidden: frozenset[str]) -> bool:
        """Whether a name means the same table or view everywhere."""
        return path[-1] not in hidden and self.known[path] == 1

    def columns(self, view: Path) -> list[str]:
        query = (
            "SELECT column_name FROM duckdb_columns() WHERE (lower(database_name), lower(schema_name), "
            "lower(table_name)) = (?, ?, ?) ORDER BY column_index"
        )
        return [row[0] for row in self.con.execute(query, list(view)).fetchall()]


def common_names(tree: Tree) -> frozenset[str]:
    return frozenset(name for name, _ in common_tables(tree))


def select_of(statement: str) -> str:
    """The SELECT of a CREATE VIEW statement as DuckDB stores it."""
    begin = next(word.at for word in tokens(statement) if word.depth == 0 and word.word == "AS")
    return statement[begin + 2 :]


def shift_places(tree: Any, by: int) -> Any:
    """The tree with its places in a text that lies `by` bytes further on."""
    if isinstance(tree, dict):
        found = {k: shift_places(v, by) for k, v in tree.items()}
        place = tree.get("query_location")
        return found if place is None or place >= UNKNOWN else {**found, "query_location": place + by}
    return [shift_places(v, by) for v in tree] if isinstance(tree, list) else tree
