"""One SQL statement: its SELECT is found, parsed by DuckDB into a syntax tree, and written as text again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb

from complete_fn_connectors.duckdb_query.json_versions import LostMaterialized, Tree, modern_tree, tree_to_write

Parameters = Sequence[Any] | Mapping[str, Any] | None

BEGINS_SELECT = ("SELECT", "WITH", "FROM", "VALUES")


class RunsPlainly(Exception):
    """The statement is not planned as a whole; the text says why. This exception never leaves this package."""


@dataclass(frozen=True)
class Statement:
    """`text` is one statement; `text[start:stop]` its SELECT, of which `tree` is DuckDB's serialisation.

    Attributes:
        returns_rows: Whether the statement is the SELECT itself, not a CREATE TABLE, INSERT or COPY around one.
    """

    text: str
    tree: Tree
    start: int
    stop: int
    returns_rows: bool

    @property
    def select(self) -> str:
        return self.text[self.start : self.stop]

    def with_select(self, select: str) -> str:
        """The whole statement around another SELECT."""
        return f"{self.text[: self.start]}{select}{self.text[self.stop :]}"


def read_statement(con: duckdb.DuckDBPyConnection, text: str) -> Statement:
    """Find the SELECT of a statement.

    Raises:
        RunsPlainly: There are several statements, or no SELECT that may be run by itself.
        duckdb.Error: The text is no SQL.
    """
    statements = con.extract_statements(text)
    if len(statements) != 1:
        raise RunsPlainly(f"{len(statements)} statements at once")
    text, kind = statements[0].query, statements[0].type
    if kind == duckdb.StatementType.SELECT:
        start, stop = 0, len(text)
    else:
        start, stop = inner_select(con, kind, text)
    tree = parse(con, text[start:stop])
    if tree["node"]["type"] == "SELECT_NODE" and is_show(tree["node"]):
        raise RunsPlainly("DESCRIBE or SUMMARIZE")
    return Statement(text, tree, start, stop, kind == duckdb.StatementType.SELECT)


def is_show(node: Tree) -> bool:
    return bool((node.get("from_table") or {}).get("type") == "SHOW_REF")


def inner_select(con: duckdb.DuckDBPyConnection, kind: Any, text: str) -> tuple[int, int]:
    """Where the SELECT of CREATE TABLE AS, INSERT or COPY (...) TO begins and ends.

    Raises:
        RunsPlainly: The SELECT cannot be told from the rest of the statement.
    """
    words = list(tokens(text))
    if kind == duckdb.StatementType.INSERT and words[0].word == "INSERT":
        return insert_select(words, text)
    if kind == duckdb.StatementType.COPY and len(words) > 1 and words[1].word == "(":
        return copy_select(words, text)
    if kind == duckdb.StatementType.CREATE and "TABLE" in [w.word for w in words[1:4]]:
        return create_select(con, words, text)
    raise RunsPlainly(f"a statement of kind {kind.name}")


@dataclass(frozen=True)
class Token:
    """A word or sign, upper-cased, at a place of the text; `depth` counts the open parentheses around it."""

    word: str
    at: int
    depth: int


def tokens(text: str) -> Iterator[Token]:
    raw = text.encode()
    found = [at for at, kind in duckdb.tokenize(text) if kind != duckdb.token_type.comment]
    if not text.isascii():
        found = [len(raw[:at].decode()) for at in found]  # DuckDB counts bytes
    depth = 0
    for at, end in zip(found, [*found[1:], len(text)], strict=True):
        word = re.split("--|/[*]", text[at:end])[0].strip().upper()
        depth -= word.startswith(")")
        yield Token(word[:1] if word[:1] in "()" else word, at, depth + (word[:1] == ")"))
        depth += word.startswith("(")


def insert_select(words: list[Token], text: str) -> tuple[int, int]:
    begin = next((n for n, w in enumerate(words) if w.depth == 0 and w.word in BEGINS_SELECT), None)
    if begin is None:
        raise RunsPlainly("an INSERT without a SELECT")
    for word, after in zip(words[begin:], [*words[begin + 1 :], Token("", len(text), 0)], strict=True):
        if word.depth == 0 and (word.word == "RETURNING" or (word.word == "ON" and after.word == "CONFLICT")):
            return words[begin].at, word.at
    return words[begin].at, len(text)


def copy_select(words: list[Token], text: str) -> tuple[int, int]:
    end = next(n for n, w in enumerate(words) if n > 1 and w.word == ")" and w.depth == 1)
    target = re.match(r"TO\s+'((?:[^']|'')+)'", text[words[end].at + 1 :].lstrip(), re.IGNORECASE)
    folder = Path(target[1].replace("''", "'")).expanduser().parent if target and "://" not in target[1] else Path()
    if not folder.exists():
        raise RunsPlainly(f"there is no folder {str(folder)!r}")  # DuckDB sees it after the first rows
    return words[1].at + 1, words[end].at


def create_select(con: duckdb.DuckDBPyConnection, words: list[Token], text: str) -> tuple[int, int]:
    names = [w.word for w in words]
    table = names.index("TABLE")
    begin = next((n for n, w in enumerate(words) if w.depth == 0 and w.word == "AS" and n > table), None)
    if begin is None or begin + 1 >= len(words) or names[table + 1] == "IF":
        raise RunsPlainly("a CREATE TABLE without AS, or IF NOT EXISTS")
    stop = next(w.at for w in words[table + 2 : begin + 1] if w.word in ("(", "AS"))  # a quoted name may have both
    name = text[words[table + 1].at : stop]
    if "REPLACE" not in names[:table] and "error" not in plan_error(con, f"FROM {name}"):
        raise RunsPlainly("the table is there already")
    return words[begin + 1].at, len(text)


def plan_error(con: duckdb.DuckDBPyConnection, select: str) -> dict[str, Any]:
    """{} if DuckDB can plan the SELECT, else the error as DuckDB gives it."""
    try:
        found = json.loads(fetch_value(con, "SELECT json_serialize_plan(?::VARCHAR)", select) or "")
    except ValueError:  # a plan with a constant that is no valid JSON, as a default of NaN
        return {}
    return found if found.get("error") else {}


def fetch_value(con: duckdb.DuckDBPyConnection, query: str, *parameters: Any) -> Any:
    """The first value of a result. The result is read to its end, as an unfinished one would block the connection."""
    rows = con.execute(query, list(parameters)).fetchall()
    return rows[0][0] if rows else None


def parse(con: duckdb.DuckDBPyConnection, select: str) -> Tree:
    """The tree of a SELECT: `node` and `named_param_map`.

    Raises:
        RunsPlainly: DuckDB does not serialise the SELECT.
    """
    found = json.loads(fetch_value(con, "SELECT json_serialize_sql(?::VARCHAR)", select))
    if found.get("error"):
        raise RunsPlainly(f"DuckDB does not serialise it: {found.get('error_message')}")
    try:
        return modern_tree(found["statements"][0], select)
    except LostMaterialized:
        raise RunsPlainly(f"DuckDB {duckdb.__version__} does not serialise MATERIALIZED") from None


def to_text(con: duckdb.DuckDBPyConnection, tree: Tree) -> str:
    """The SELECT of a tree."""
    whole = json.dumps({"error": False, "statements": [tree_to_write(tree)]})
    return str(fetch_value(con, "SELECT json_deserialize_sql(?::JSON)", whole))


def parse_expression(con: duckdb.DuckDBPyConnection, text: str) -> Tree:
    """The tree of one expression."""
    found: Tree = parse(con, f"SELECT {text}")["node"]["select_list"][0]
    return found


def nodes(tree: Any) -> Iterator[Tree]:
    """All objects of a tree, the outer ones first."""
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from nodes(value)


def table_path(node: Tree) -> tuple[str, ...]:
    """The parts of the name in a reference to a table or view, in lower case; () for another node."""
    return lower_path(node["qualified_name"]["path"]) if node.get("type") == "BASE_TABLE" else ()


def lower_path(path: Sequence[str]) -> tuple[str, ...]:
    return tuple(part.lower() for part in path)


def common_tables(tree: Any) -> list[tuple[str, Tree]]:
    """(name in lower case, definition) of all common table expressions in a tree."""
    entries = [entry for node in nodes(tree) for entry in node.get("cte_map", {}).get("map", [])]
    return [(entry["key"].lower(), entry["value"]) for entry in entries]


def replace_nodes(tree: Any, change: Any) -> Any:
    """A copy of the tree in which `change(node)` replaces each node for which it is not None."""
    if isinstance(tree, dict):
        changed = change(tree)
        return changed if changed is not None else {k: replace_nodes(v, change) for k, v in tree.items()}
    return [replace_nodes(v, change) for v in tree] if isinstance(tree, list) else tree


def put_values_in(con: duckdb.DuckDBPyConnection, tree: Tree, parameters: Parameters) -> Tree:
    """The tree with constants for its parameters. DuckDB plans a query by the values of its parameters as well.

    Raises:
        RunsPlainly: A parameter is missing, or its value cannot be written as a constant.
    """
    wanted = [p["key"] for p in tree["named_param_map"]]
    if not wanted and not parameters:
        return tree
    given = parameters or ()
    values = given if isinstance(given, Mapping) else {str(n): v for n, v in enumerate(given, 1)}
    if set(values) != set(wanted):
        raise RunsPlainly("parameters outside of the SELECT")
    constants = {name: parse_expression(con, sql_literal(value)) for name, value in values.items()}

    def change(node: Tree) -> Tree | None:
        return constants[node["identifier"]] if node.get("type") == "VALUE_PARAMETER" else None

    found: Tree = replace_nodes(tree, change)
    return found | {"named_param_map": []}


def sql_literal(value: Any) -> str:
    """A Python value as SQL writes it.

    Raises:
        RunsPlainly: The value has another type than the plain ones.
    """
    if value is None or isinstance(value, bool | int):
        return "NULL" if value is None else str(value)
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value!r}::DOUBLE"
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value:f}"
    if isinstance(value, datetime) and value.tzinfo is None:
        return f"TIMESTAMP '{value.isoformat(sep=' ')}'"
    if isinstance(value, date) and not isinstance(value, datetime):
        return f"DATE '{value.isoformat()}'"
    raise RunsPlainly(f"a parameter of type {type(value).__name__}")
