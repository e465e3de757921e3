"""Canaries: the fields of DuckDB's syntax trees and plans that we read and write are still there, and mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import pytest
from duckdb.func import ARROW, SPECIAL

from complete_fn_connectors.duckdb_query import json_versions as duckdb_versions
from complete_fn_connectors.duckdb_query.call_sites import SITE, make_text_constant, tag_calls
from complete_fn_connectors.duckdb_query.dependencies import read_plan
from complete_fn_connectors.duckdb_query.guards import FALSE, TRUE, join_conditions, make_case
from complete_fn_connectors.duckdb_query.json_versions import Tree
from complete_fn_connectors.duckdb_query.planner import expression_text
from complete_fn_connectors.duckdb_query.pushdown import make_column
from complete_fn_connectors.duckdb_query.syntax_tree import RunsPlainly, nodes, parse, to_text
from tests.canaries import Need, complaint, needs_in

pytestmark = pytest.mark.canary

ROOM = Path(duckdb_versions.__file__).parent
NEEDS = needs_in(duckdb_versions.__doc__ or "")
TREES = (
    "SELECT f(text), count(*) FILTER (k = 1), string_agg(text, ',' ORDER BY id), count(DISTINCT k), "
    "struct_pack(a := $1) FROM docs WHERE k = 1 AND (id > 3 OR text = 'a') GROUP BY ALL HAVING count(*) > 1 "
    "QUALIFY row_number() OVER () = 1 ORDER BY 1 LIMIT 3",
    "WITH c(a) AS (SELECT main.f(text) FROM docs) SELECT *, c.* FROM c JOIN (SELECT 1 AS a) AS v(a) USING (a), "
    "main.docs AS d TABLESAMPLE 10% WHERE EXISTS (SELECT 1) AND c.a IN (SELECT text FROM docs)",
    "SELECT CASE WHEN k = 1 THEN list_transform([1], lambda x: x + 1) END FROM docs, (DESCRIBE docs)",
)
PLANS = (
    f"SELECT {SITE}f('r:0', text), count(k), CASE WHEN id = 1 THEN TRY_CAST(text AS DECIMAL(9, 2)) ELSE 1.5 END, "
    "list_transform(['a'], lambda x: x || 'y') FROM docs "
    "WHERE (k = 1 OR text IN ('a', 'b')) AND id IS NOT NULL GROUP BY ALL LIMIT 60 OFFSET 1",
    "WITH c AS MATERIALIZED (SELECT id FROM docs) SELECT c.id FROM c JOIN c AS d USING (id)",
    "WITH RECURSIVE r AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM r WHERE x < 3) FROM r",
    "SELECT id FROM docs USING SAMPLE 3 ROWS",
    "SELECT id FROM docs ORDER BY k LIMIT 60 OFFSET 1",
)


@contextmanager
def connected() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("CREATE TABLE docs AS SELECT i AS id, 'doc ' || i AS text, i % 5 AS k FROM range(50) r(i)")
        for name in ("f", f"{SITE}f"):
            opened.create_function(name, echo, None, "VARCHAR", type=ARROW, null_handling=SPECIAL)
        yield opened


@pytest.fixture
def con() -> Iterator[duckdb.DuckDBPyConnection]:
    with connected() as opened:
        yield opened


def echo(*columns: Any) -> Any:
    return columns[-1]


def owner_of(node: Tree, where: str) -> str:
    """What the table of `duckdb_versions` calls a node that stands in the field `where`."""
    if node.get("type") == "SUBQUERY" and "class" not in node:
        return "SubqueryRef"
    if node.get("filter_type") or "expression_class" in node:
        return str(node.get("expression_class"))
    named = node.get("class") or (node.get("type") if where not in ("limit_val", "offset_val") else None)
    return str(named) if isinstance(named, str) else where


def fields_in(tree: Any, where: str) -> Iterator[tuple[str, str]]:
    """(owner, field) of all nodes of a tree."""
    if isinstance(tree, list):
        for part in tree:
            yield from fields_in(part, where)
    elif isinstance(tree, dict):
        for field, value in tree.items():
            yield owner_of(tree, where), field
            yield from fields_in(value, field)


@pytest.fixture(scope="module")
def fields() -> dict[str, set[tuple[str, str]]]:
    """(owner, field) of all nodes that `TREES` and `PLANS` have, by the function that gives them."""
    with connected() as con:
        trees = [parse(con, text) for text in TREES]
        plans = [read_plan(con, text, False) for text in PLANS]
        for text in PLANS:
            with suppress(RunsPlainly):  # 2.0.0 does not serialise each plan that it optimises
                plans.append(read_plan(con, text, True))
    return {
        "json_serialize_sql": set(fields_in(trees, "statements")),
        "json_serialize_plan": set(fields_in(plans, "plans")),
    }


def missing(need: Need, fields: dict[str, set[tuple[str, str]]]) -> str | None:
    function, _, owner = need.owner.partition(":")
    names = {field: None for named, field in fields[function] if named == owner}
    return complaint("DuckDB", f"{duckdb.__version__}'s {function}", need, type(owner, (), names))


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: f"{need.owner}.{need.name}")
def test_duckdb_still_has(fields: dict[str, set[tuple[str, str]]], need: Need) -> None:
    assert missing(need, fields) is None


def test_what_is_missing_is_named_with_its_reader(fields: dict[str, set[tuple[str, str]]]) -> None:
    for need in NEEDS:
        function, _, owner = need.owner.partition(":")
        left = {**fields, function: fields[function] - {(owner, need.name)}}
        said = f"DuckDB {duckdb.__version__}'s {function} has no {owner}.{need.name}, which {need.reader} need"
        assert (missing(need, left) or "").startswith(said)


def test_every_entry_says_who_reads_it_for_what_and_why_not_publicly() -> None:
    assert len(NEEDS) == len(set(NEEDS)) > 100
    readers = {path.name for path in ROOM.rglob("*.py")}
    for need in NEEDS:
        assert {*need.reader.split(" and ")} <= readers, need
        assert need.purpose.startswith("to "), need
        assert need.reason.endswith("."), need
    table = [line for line in (duckdb_versions.__doc__ or "").splitlines() if line.startswith("json_serialize_")]
    assert {line.split()[0] for line in table} == {need.owner for need in NEEDS}


def test_what_we_make_is_taken(con: duckdb.DuckDBPyConnection) -> None:
    column = make_column("d", "k")
    both = join_conditions("CONJUNCTION_AND", [column, TRUE])
    for tree, written in (
        (both, "(d.k AND true)"),
        (join_conditions("CONJUNCTION_OR", [column, FALSE]), "(d.k OR false)"),
        (make_case(both, make_text_constant("it's"), FALSE), "CASE WHEN (d.k AND true) THEN 'it''s' ELSE false END"),
    ):
        assert plain(expression_text(con, tree)) == plain(written)


def plain(text: str) -> str:
    """A text without the blanks and parentheses that versions write in different numbers."""
    return "".join(sign for sign in text if sign not in " ()")


def test_a_numbered_call_comes_back_as_it_was_written(con: duckdb.DuckDBPyConnection) -> None:
    written = "f(text,  'ü)', /* ( */ f(\"text\"))"
    query = f"SELECT 'ü', {written} || 'x' FROM docs WHERE f(text) = 'a'"
    tagged = tag_calls(parse(con, query), query, {"f": "f"}, "run1")
    assert [site.text for site in tagged.sites] == ['f("text")', " ".join(written.split()), "f(text)"]
    plan = read_plan(con, to_text(con, tagged.tree))
    names = [node["qname"]["path"][-1] for node in nodes(plan) if node.get("type") == "BOUND_FUNCTION"]
    assert names.count(f"{SITE}f") == 3
    assert to_text(con, tagged.untagged(tagged.tree)) == to_text(con, parse(con, query))
