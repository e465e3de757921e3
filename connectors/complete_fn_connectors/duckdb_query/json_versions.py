"""DuckDB's versions: what of its JSON we read and write, and how 1.x differs from 2.x. Only this module knows.

`json_serialize_sql` gives the syntax tree of a SELECT, `json_serialize_plan` its plan. The functions are public; the
fields of what they give are DuckDB's own, and 2.0 renamed many. The other modules know the names of 2.x: `modern_tree`
and `modern_plan` make those of what DuckDB 1.4 and 1.5 give, `tree_to_write` goes back.

| 1.x | 2.x |
|---|---|
| `FUNCTION.children`, the name of an argument is its alias | `FUNCTION.arguments`: `name`, `expression` |
| `catalog`, `schema`, `function_name` of FUNCTION, `catalog_name`, .. of BASE_TABLE | `qualified_name.path` as well |
| `CONSTANT.value`: type, is_null, value | `literal`: `kind`, `text` (here of texts, integers and booleans only) |
| no length of a place in the text | `query_location_length` (here of calls only) |
| common table: `query.node` | `query_node` |
| 1.4: a CTE_NODE around the query for each MATERIALIZED one, 1.5: MATERIALIZED gets lost | neither |
| plans: `catalog_name`, `schema_name`, `name` of a function or scan | `qname.path` |
| plans: BOUND_COMPARISON with `left`, `right`; BOUND_CAST with `child`, `try_cast` | BOUND_FUNCTION with `children`, \
`arguments`, `function_data.try_cast` |

What 1.x has under names of its own and nothing here reads, as `CAST.cast_type` and `WINDOW.children`, stays as it is.

The canaries (`test_canaries_duckdb.py`) read the table below and look up each field in the JSON of
the DuckDB that is installed. An entry is: which JSON and which node in it, by its class or type (where it has neither,
by the field that it stands in), and its fields; then which file needs them for what, and why no public way does.

json_serialize_sql:statements  node named_param_map
    syntax_tree.py, to find a statement's parameters. Only the tree says which of them are in its SELECT.
json_serialize_sql:SELECT_NODE  type modifiers cte_map select_list from_table where_clause group_expressions group_sets
json_serialize_sql:SELECT_NODE  aggregate_handling having sample qualify
    pushdown.py and planner.py, to change and to make SELECTs. DuckDB has no other syntax tree for Python.
json_serialize_sql:LIMIT_MODIFIER  type limit
json_serialize_sql:ORDER_MODIFIER  type
    dependencies.py and pushdown.py, to look at a query with a larger LIMIT, and to leave such queries alone. As above.
json_serialize_sql:cte_map  map
json_serialize_sql:map  key value
json_serialize_sql:value  aliases query_node
    syntax_tree.py and pushdown.py, to read common tables. As above.
json_serialize_sql:BASE_TABLE  type alias sample at_clause table_name column_name_alias qualified_name
json_serialize_sql:BASE_TABLE  query_location query_location_length
    views.py and pushdown.py, to know which tables and views are read, and to put a subquery in the place of one.
    `duckdb.get_table_names` says neither where a name stands nor what it is called there.
json_serialize_sql:SubqueryRef  type alias sample subquery column_name_alias query_location query_location_length
json_serialize_sql:JOIN  type alias sample left right condition join_type ref_type using_columns
json_serialize_sql:SHOW_REF  type
    views.py and pushdown.py, to know what a FROM reads and to put views into it. As for SELECT_NODE.
json_serialize_sql:FUNCTION  class type alias query_location query_location_length function_name schema catalog
json_serialize_sql:FUNCTION  qualified_name arguments filter distinct order_bys is_operator
json_serialize_sql:arguments  name expression
json_serialize_sql:qualified_name  path
json_serialize_sql:ORDER_MODIFIER  orders
    call_sites.py, to find, number and show the calls. As above.
json_serialize_sql:COLUMN_REF  class type alias query_location column_names
json_serialize_sql:STAR  class relation_name exclude_list replace_list columns expr qualified_exclude_list rename_list
json_serialize_sql:SUBQUERY  class subquery child
json_serialize_sql:COMPARISON  type left right
json_serialize_sql:WINDOW  class
json_serialize_sql:LAMBDA  class
    pushdown.py, to move a condition into a subquery. As above.
json_serialize_sql:CONJUNCTION  class type alias query_location children
json_serialize_sql:CASE  class type alias query_location case_checks else_expr
json_serialize_sql:case_checks  when_expr then_expr
json_serialize_sql:CONSTANT  class type alias query_location literal
json_serialize_sql:literal  kind text
    guards.py, to put conditions before calls. As above.
json_serialize_sql:PARAMETER  type identifier
    syntax_tree.py, to put the values of parameters in. As above.
json_serialize_plan:LOGICAL_GET  type qname
json_serialize_plan:LOGICAL_FILTER  type children expressions
json_serialize_plan:LOGICAL_PROJECTION  type children
json_serialize_plan:LOGICAL_LIMIT  type children limit_val offset_val
json_serialize_plan:limit_val  type constant_integer
json_serialize_plan:LOGICAL_TOP_N  limit offset
json_serialize_plan:LOGICAL_COMPARISON_JOIN  type children join_type
json_serialize_plan:LOGICAL_MATERIALIZED_CTE  children
json_serialize_plan:LOGICAL_RECURSIVE_CTE  children
json_serialize_plan:LOGICAL_SAMPLE  type
json_serialize_plan:qname  path
    dependencies.py and may_fail.py, to know in which order DuckDB evaluates calls. EXPLAIN (FORMAT json) lacks them.
json_serialize_plan:BOUND_FUNCTION  expression_class type children arguments return_type qname function_data
json_serialize_plan:function_data  try_cast lambda_expr
json_serialize_plan:return_type  id type_info
json_serialize_plan:BOUND_AGGREGATE  children qname
json_serialize_plan:BOUND_OPERATOR  type children
json_serialize_plan:BOUND_CONJUNCTION  type children
json_serialize_plan:BOUND_CASE  type case_checks else_expr
json_serialize_plan:case_checks  when_expr then_expr
json_serialize_plan:BOUND_CONSTANT  type value
json_serialize_plan:value  value
    dependencies.py and may_fail.py, to know which call guards which, which is made for each element of a
    list, and what cannot fail. As above.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import duckdb

Tree = dict[str, Any]

IS_OLD = int(duckdb.__version__.partition(".")[0]) < 2
LITERALS = {"VARCHAR": "STRING", "INTEGER": "INTEGER", "BIGINT": "INTEGER", "BOOLEAN": "BOOLEAN"}
DEFAULT = "CTE_MATERIALIZE_DEFAULT"
WIDEST_INTEGER = 2**31  # DuckDB 1.x reads a larger number as a BIGINT


class LostMaterialized(Exception):
    """DuckDB 1.5 does not serialise MATERIALIZED, so that its text would be another query."""


def modern_tree(statement: Tree, text: str) -> Tree:
    """A statement of `json_serialize_sql` as 2.x has it. `text` is what was parsed.

    Raises:
        LostMaterialized: the tree lacks what the text says.
    """
    if not IS_OLD:
        return statement
    calls = CallLengths(text)
    materialized: list[Tree] = []

    def change(node: Tree) -> Tree:
        if node.get("materialized", DEFAULT) != DEFAULT:
            materialized.append(node)
        return modern_node(node, calls)

    found: Tree = rebuilt(statement, change)
    if calls.has_word(b"MATERIALIZED") and not materialized:
        raise LostMaterialized
    return found


def tree_to_write(statement: Tree) -> Tree:
    """The statement as `json_deserialize_sql` of this DuckDB takes it."""
    found: Tree = rebuilt(statement, old_node) if IS_OLD else statement
    return found


def modern_plan(plan: Tree) -> Tree:
    """A plan of `json_serialize_plan` as 2.x has it."""
    found: Tree = rebuilt(plan, modern_operator) if IS_OLD else plan
    return found


def read_batches(result: Any, rows: int) -> Any:
    """The rows of a connection or relation as an Arrow reader, so many at a time."""
    if hasattr(result, "to_arrow_reader"):
        return result.to_arrow_reader(rows)
    return result.fetch_record_batch(rows)  # its name in 1.4, deprecated later


def statement_texts(con: duckdb.DuckDBPyConnection, text: str) -> list[str]:
    """The statements of a text. 1.x makes two of a PIVOT, without their texts; here it is one."""
    statements = con.extract_statements(text)
    if all(statement.query for statement in statements):
        return [statement.query for statement in statements]
    raw = text.encode()
    ends = [at for at, _ in duckdb.tokenize(text) if raw[at : at + 1] == b";"]
    parts = [raw[begin:end].decode() for begin, end in zip([0, *(at + 1 for at in ends)], [*ends, None], strict=True)]
    return [part for part in parts if con.extract_statements(part)]


def drop_unread_rows(con: duckdb.DuckDBPyConnection) -> None:
    """End a result that was not read to its end: with its transaction 1.x takes functions back that are removed
    meanwhile. 2.x refuses to remove them."""
    if IS_OLD:
        with suppress(duckdb.ConnectionException):  # closed
            con.execute("SELECT 1").fetchall()


def rebuilt(tree: Any, change: Callable[[Tree], Any]) -> Any:
    """A copy of the tree, `change(object)` in the place of each object; the inner ones first."""
    if isinstance(tree, dict):
        return change({key: rebuilt(value, change) for key, value in tree.items()})
    return [rebuilt(value, change) for value in tree] if isinstance(tree, list) else tree


def modern_node(node: Tree, calls: CallLengths) -> Tree:
    if node.get("class") == "FUNCTION":
        arguments = [{"name": child["alias"], "expression": child} for child in node["children"]]
        path = path_of(node["catalog"], node["schema"], node["function_name"])
        kept = {key: value for key, value in node.items() if key != "children"}
        length = 0 if node["is_operator"] else calls.length(node["query_location"])
        return {**kept, "arguments": arguments, "qualified_name": path, "query_location_length": length}
    if node.get("class") == "CONSTANT":
        literal = literal_of(node["value"])
        return node if literal is None else {**without(node, "value"), "literal": literal}
    if node.get("type") == "BASE_TABLE":
        path = path_of(node["catalog_name"], node["schema_name"], node["table_name"])
        return {**node, "qualified_name": path, "query_location_length": 0}
    if node.get("type") == "SUBQUERY" and "class" not in node:
        return {**node, "query_location_length": 0}
    if node.get("type") == "CTE_NODE":
        child: Tree = node["child"]  # it has the common tables as well
        return child
    if "materialized" in node:
        return {**without(node, "query"), "query_node": node["query"]["node"]}
    return node


def old_node(node: Tree) -> Tree:
    if node.get("class") == "FUNCTION":
        children = [{**argument["expression"], "alias": argument["name"]} for argument in node["arguments"]]
        return {**without(node, "arguments", "qualified_name"), "children": children}
    if "literal" in node:
        return {**without(node, "literal"), "value": value_of(node["literal"])}
    if "query_node" in node:
        query = {"node": node["query_node"], "named_param_map": []}
        return {**without(node, "query_node"), "query": query}
    return node


def without(node: Tree, *keys: str) -> Tree:
    return {key: value for key, value in node.items() if key not in keys}


def path_of(*parts: str) -> Tree:
    return {"path": [part for part in parts if part]}


def literal_of(value: Tree) -> Tree | None:
    """The literal that a value is written as; None if it is of a type that stays a value."""
    kind = LITERALS.get(value["type"]["id"])
    if kind is None or value["is_null"]:
        return None
    text = str(value["value"])
    return {"kind": kind, "text": text.lower() if kind == "BOOLEAN" else text}


def value_of(literal: Tree) -> Tree:
    value: Any = literal["text"]
    kind = "VARCHAR"
    if literal["kind"] == "BOOLEAN":
        kind, value = "BOOLEAN", value == "true"
    elif literal["kind"] == "INTEGER":
        value = int(value)
        kind = "INTEGER" if -WIDEST_INTEGER < value < WIDEST_INTEGER else "BIGINT"
    return {"type": {"id": kind, "type_info": None}, "is_null": False, "value": value}


class CallLengths:
    """The lengths of calls in a text, by the matching of its parentheses; places are in bytes."""

    def __init__(self, text: str) -> None:
        self.raw = text.encode()
        self.starts = [at for at, _ in duckdb.tokenize(text)]
        self.closing: dict[int, int] = {}  # place of a ( -> place of its )
        unclosed: list[int] = []
        for at in self.starts:
            if self.raw[at : at + 1] == b"(":
                unclosed.append(at)
            elif self.raw[at : at + 1] == b")" and unclosed:
                self.closing[unclosed.pop()] = at

    def length(self, at: int) -> int:
        """The length of `name(...)` or `path.name(...)` that begins at a place; 0 if no call does."""
        number = bisect_left(self.starts, at)
        for start in self.starts[number:] if self.starts[number : number + 1] == [at] else ():
            sign = self.raw[start : start + 1]
            if sign == b"(":
                return self.closing[start] + 1 - at if start in self.closing else 0
            if not (sign.isalpha() or sign in (b"_", b'"', b".") or sign > b"\x7f"):
                return 0
        return 0

    def has_word(self, word: bytes) -> bool:
        return any(self.raw[at : at + len(word)].upper() == word for at in self.starts)


def modern_operator(node: Tree) -> Tree:
    kind = node.get("expression_class")
    if kind == "BOUND_COMPARISON":
        sides = [node["left"], node["right"]]
        return {**without(node, "left", "right"), "expression_class": "BOUND_FUNCTION", "children": sides}
    if kind == "BOUND_CAST":
        return {
            **without(node, "child", "try_cast"),
            "expression_class": "BOUND_FUNCTION",
            "children": [node["child"]],
            "arguments": [type_of(node["child"])],
            "qname": {"path": ["__cast"]},
            "function_data": {"try_cast": node.get("try_cast", False)},
        }
    if "has_serialize" in node and "name" in node:  # a function or a scan
        path = path_of(node.get("catalog_name", ""), node.get("schema_name", ""), node["name"])
        return {**without(node, "catalog_name", "schema_name", "name"), "qname": path}
    return node


def type_of(expression: Tree) -> Tree:
    """The type of a bound expression; {} where the plan does not say it."""
    if expression.get("expression_class") == "BOUND_CONSTANT":
        found: Tree = expression["value"]["type"]
        return found
    if expression.get("type", "").startswith(("COMPARE_", "CONJUNCTION_")):
        return {"id": "BOOLEAN"}
    return dict(expression.get("return_type", {}))
