"""Inside a transaction a query that can fail is not planned: a failure would undo what the user has not committed.

In collect mode a placeholder can reach an expression that no answer would reach (`coalesce(complete(...),
'none')::INT`), and a guard evaluates an expression for rows that a completion would have excluded. So inside a
transaction every expression must have a value for every row. The lists below name the expressions that always have one;
arithmetic, patterns, JSON and most casts can fail.
"""

from __future__ import annotations

from typing import Any

from complete_fn_connectors.duckdb_query.call_sites import SITE
from complete_fn_connectors.duckdb_query.json_versions import Tree
from complete_fn_connectors.duckdb_query.syntax_tree import nodes

OPERATORS = (
    *("PROJECTION", "FILTER", "GET", "AGGREGATE_AND_GROUP_BY", "ORDER_BY", "LIMIT", "TOP_N", "DISTINCT", "UNION"),
    *("COMPARISON_JOIN", "ANY_JOIN", "DELIM_JOIN", "CROSS_PRODUCT", "EXCEPT", "INTERSECT"),
    *("MATERIALIZED_CTE", "CTE_REF", "DELIM_GET", "CHUNK_GET", "DUMMY_SCAN", "EXPRESSION_GET", "EMPTY_RESULT"),
)
SCANS = ("seq_scan", "range", "generate_series")
EXPRESSIONS = ("BOUND_REF", "BOUND_COLUMN_REF", "BOUND_CONSTANT", "BOUND_CASE", "BOUND_CONJUNCTION")
CHECKS = (
    *("OPERATOR_NOT", "OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL", "OPERATOR_COALESCE"),
    *("COMPARE_IN", "COMPARE_NOT_IN"),
)
TOTAL_FUNCTIONS = (
    *("||", "concat", "~~", "!~~", "~~*", "!~~*", "lower", "upper", "length", "trim", "ltrim", "rtrim"),
    *("contains", "prefix", "suffix", "starts_with", "ends_with", "struct_pack", "struct_extract", "list_value"),
    "prompt",
)
AGGREGATES = ("count", "count_star", "min", "max", "any_value", "first")
WIDENING = ("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE")


def may_fail(written: Tree, optimised: Tree) -> str | None:
    """A description of the first part of a query that may fail for a row; None if no part can.

    Args:
        written: its plan as bound, where nothing is folded away.
        optimised: where a cast of a constant that fails is left, and others are folded.
    """
    for node in nodes(written):
        if "expression_class" in node and not is_total(node):
            return describe_node(node)
        if str(node.get("type")).startswith("LOGICAL_") and not runs_always(node):
            return describe_node(node)
    return next((describe_node(n) for n in nodes(optimised) if is_cast(n) and is_constant(n)), None)


def is_total(node: Tree) -> bool:
    """Whether an expression has a value for all values of its parts."""
    kind, form, name = node["expression_class"], node["type"], function_name(node)
    if kind == "BOUND_AGGREGATE":
        return name in AGGREGATES and len(node.get("children", [])) < 2
    if is_cast(node):
        return is_constant(node) or cannot_fail(node)
    if kind == "BOUND_FUNCTION":
        return form.startswith("COMPARE_") or name in TOTAL_FUNCTIONS or name.startswith(SITE)
    return kind in EXPRESSIONS or form in CHECKS


def runs_always(op: Tree) -> bool:
    """Whether an operator cannot fail, apart from its expressions."""
    kind = op["type"].removeprefix("LOGICAL_")
    if kind == "GET":
        return function_name(op) in SCANS and not op.get("children")
    if kind == "LIMIT":
        limits = [(op.get(k) or {}).get("type", "UNSET") for k in ("limit_val", "offset_val")]
        return not any("EXPRESSION" in limit for limit in limits)
    return kind in OPERATORS and op.get("join_type") != "SINGLE"  # a subquery that may have one row only


def cannot_fail(cast: Tree) -> bool:
    types = [*cast.get("arguments", []), cast.get("return_type", {})]
    kinds = ["" if kind.get("type_info") else str(kind.get("id")) for kind in types]  # JSON is a VARCHAR with more
    if kinds[-1] == "VARCHAR" or cast.get("function_data", {}).get("try_cast"):
        return True
    return all(k in WIDENING for k in kinds) and WIDENING.index(kinds[0]) <= WIDENING.index(kinds[-1])


def is_cast(node: Tree) -> bool:
    return function_name(node) == "__cast"


def is_constant(node: Tree) -> bool:
    return node.get("type") == "VALUE_CONSTANT" or (is_cast(node) and all(map(is_constant, node.get("children", []))))


def function_name(node: Tree) -> str:
    path: list[Any] = (node.get("qname") or {}).get("path") or [""]
    return str(path[-1])


def describe_node(node: Tree) -> str:
    """A node in words."""
    if is_cast(node):
        return f"a cast to {node.get('return_type', {}).get('id')}"
    if function_name(node):
        return f"{function_name(node)}()"
    return str(node["type"]).removeprefix("LOGICAL_").replace("_", " ").lower()
