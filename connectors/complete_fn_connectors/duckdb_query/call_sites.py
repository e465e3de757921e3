"""Every completion in a query gets a number: the call becomes a call of our own function with the number in front."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from complete_fn_connectors.duckdb_query.json_versions import Tree
from complete_fn_connectors.duckdb_query.syntax_tree import RunsPlainly, nodes, replace_nodes

SITE = "complete_fn_site_"


@dataclass(frozen=True)
class Site:
    """One place of a query at which a function is called. Equal calls in one clause are one site.

    Attributes:
        name: of the function, as registered.
        text: the call as the query writes it.
        clause: `WHERE`, `FROM` or `SELECT` (which stands for all that comes after the filter).
    """

    number: int
    name: str
    text: str
    clause: str


@dataclass
class Tagged:
    """A tree whose calls have `run:number` as their first argument, with its sites and the original calls."""

    run: str
    tree: Tree = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    calls: list[Tree] = field(default_factory=list)
    keys: dict[tuple[int, str, str], int] = field(default_factory=dict)

    def untagged(self, tree: Tree) -> Tree:
        """The tree with the original calls."""

        def change(node: Tree) -> Tree | None:
            number = site_of(node)
            return None if number is None else {**self.calls[number], "alias": node.get("alias", "")}

        found: Tree = replace_nodes(tree, change)
        return found


def tag_calls(tree: Tree, text: str, names: Mapping[str, str], run: str) -> Tagged:
    """Number the calls of the functions `names` (name in the query -> registered name).

    Calls inside of lambdas, and those with FILTER, ORDER BY or named arguments, stay as they are.

    Raises:
        RunsPlainly: the query calls none of them.
    """
    tagged = Tagged(run)
    raw = text.encode()
    scopes: list[int] = []

    def walk(node: Any, scope: int, clause: str) -> Any:
        if isinstance(node, list):
            return [walk(v, scope, clause) for v in node]
        if not isinstance(node, dict) or node.get("class") == "LAMBDA":
            return node
        if node.get("type") == "SELECT_NODE":
            scopes.append(len(scopes))
            scope, clause = scopes[-1], ""
        inner = {k: walk(v, scope, clause_of(node, k, clause)) for k, v in node.items()}
        name = names.get(called_name(node))
        return inner if name is None else with_number(inner, node, name, scope, clause)

    def with_number(inner: Tree, node: Tree, name: str, scope: int, clause: str) -> Tree:
        key = (scope, clause, json.dumps(without_places(node), sort_keys=True))
        number = tagged.keys.setdefault(key, len(tagged.sites))
        if number == len(tagged.sites):
            at, length = node.get("query_location", 0), node.get("query_location_length", 0)
            written = raw[at : at + length].decode(errors="replace")
            shown = " ".join(written.split()) if written.lower().startswith(called_name(node)) else f"{name}(...)"
            tagged.sites.append(Site(number, name, shown, clause or "SELECT"))
            tagged.calls.append(node)
        token = {"name": "", "expression": make_text_constant(f"{tagged.run}:{number}")}
        path = {"qualified_name": {"path": [SITE + name]}, "schema": "", "catalog": ""}
        return {**inner, **path, "function_name": SITE + name, "arguments": [token, *inner["arguments"]]}

    tagged.tree = walk(tree, -1, "")
    if not tagged.sites:
        raise RunsPlainly("no completion in it")
    return tagged


def clause_of(node: Tree, key: str, clause: str) -> str:
    """The clause that the part `key` of a node belongs to."""
    if node.get("type") != "SELECT_NODE":
        return clause
    return {"where_clause": "WHERE", "from_table": "FROM"}.get(key, "")


def called_name(node: Tree) -> str:
    """The name of the function that a node calls, in lower case.

    '' for another node, and for a call with FILTER, DISTINCT, ORDER BY or named arguments.
    """
    if node.get("class") != "FUNCTION" or node.get("is_operator") or node.get("filter") or node.get("distinct"):
        return ""
    if node["order_bys"]["orders"] or any(a["name"] for a in node["arguments"]):
        return ""
    path: list[str] = [p.lower() for p in node.get("qualified_name", {}).get("path", [])] or [
        node["function_name"].lower()
    ]
    if path[:-1] == ["snowflake", "cortex"] and len(node["arguments"]) == 2:
        return ".".join(path)  # these two macros only call the functions
    return path[-1] if path[:-1] in ([], ["main"], ["system", "main"]) else ""


def make_text_constant(text: str) -> Tree:
    literal = {"kind": "STRING", "text": text}
    return {"class": "CONSTANT", "type": "VALUE_CONSTANT", "alias": "", "query_location": 0, "literal": literal}


def without_places(tree: Any) -> Any:
    """A copy without places in the text and without the outermost alias, so that equal calls are equal."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("query_location", "query_location_length")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return {**strip(tree), "alias": ""}


def site_of(node: Tree) -> int | None:
    """The number of a tagged call, in a syntax tree."""
    if not str(node.get("function_name", "")).startswith(SITE):
        return None
    token: str = node["arguments"][0]["expression"]["literal"]["text"]
    return int(token.rpartition(":")[2])


def sites_in(tree: Any) -> set[int]:
    return {n for n in map(site_of, nodes(tree)) if n is not None}


NAMED = ("ai_complete", "ai_classify", "ai_translate", "ai_extract")  # the macros of cortex_names.sql
